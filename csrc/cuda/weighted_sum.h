// What the host may ask of the CUDA kernel. Includes no CUDA header.
#pragma once

#include "../weighted_sum.h"
#include "launch.h"

namespace fused_ema::cuda {

Status launch_weighted_sum(Dtype out, Dtype input, const WeightedSum& sum, Stream stream);

}  // namespace fused_ema::cuda
