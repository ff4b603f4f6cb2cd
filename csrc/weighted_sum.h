// out += the sum of weights[k] * inputs[k], of tensors of equal length. No torch header.
//
// Every product and sum is one FMA in double, input after input, onto what out held; the result is
// rounded to out once. So all devices and instruction sets give the same bits.
#pragma once

#include <cstdint>

#include "dtype_pairs.h"

namespace fused_ema {

// So many addresses and weights fit into the 4 KB of a kernel's arguments.
constexpr int kMaxInputs = 128;

struct WeightedSum {
  void* out;
  int64_t n;
  int32_t num_inputs;
  const void* inputs[kMaxInputs];
  double weights[kMaxInputs];
};

// X(out type, input type)
#define FUSED_EMA_FOR_EACH_SUM(X) \
  X(float, float)                 \
  X(float, double)                \
  X(float, BFloat16)              \
  X(float, Half)                  \
  X(double, float)                \
  X(double, double)               \
  X(double, BFloat16)             \
  X(double, Half)

}  // namespace fused_ema
