// The weighted sum's CUDA kernel as a plain C function.
#include "../../csrc/cuda/weighted_sum.h"

#include <algorithm>

using namespace fused_ema;

extern "C" int launch_weighted_sum(int out_dtype, int input_dtype, void* out,
                                   const void* const* inputs, const double* weights, int num_inputs,
                                   int64_t n) {
  WeightedSum sum{out, n, num_inputs, {}, {}};
  std::copy(inputs, inputs + num_inputs, sum.inputs);
  std::copy(weights, weights + num_inputs, sum.weights);
  return cuda::launch_weighted_sum(static_cast<Dtype>(out_dtype), static_cast<Dtype>(input_dtype),
                                   sum, nullptr);
}
