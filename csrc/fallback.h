// The operations with torch's own functions, for devices and pairs without a kernel. The same as
// fused_ema/_foreach.py, which serves where nothing could be compiled.
#pragma once

#include "checks.h"

namespace fused_ema::fallback {

// momentum by value, or from a 0-dim float64 tensor on the device where one is given.
void update(const Tensors& ema, const Tensors& params, double momentum,
            const std::optional<at::Tensor>& device_momentum, Form form);
void swap(const Tensors& a, const Tensors& b);
void copy(const Tensors& dst, const Tensors& src);

}  // namespace fused_ema::fallback
