// The weighted sum's kernels, one table per instruction set.
#pragma once

#include <cstring>

#include "../weighted_sum.h"
#include "launch.h"

namespace fused_ema::cpu {

// Elements [begin, end).
using SumKernel = void (*)(const WeightedSum& sum, int64_t begin, int64_t end);

#define FUSED_EMA_DECLARE_KERNELS(isa)          \
  namespace isa {                               \
  SumKernel sum_kernel(Dtype out, Dtype input); \
  }
FUSED_EMA_DECLARE_KERNELS(generic)
FUSED_EMA_DECLARE_KERNELS(avx2)
FUSED_EMA_DECLARE_KERNELS(avx512)
#undef FUSED_EMA_DECLARE_KERNELS

// Of the instruction set in use; null for other dtypes.
inline SumKernel sum_kernel(Dtype out, Dtype input) {
#if defined(__x86_64__)
  if (std::strcmp(instruction_set(), "avx512") == 0) return avx512::sum_kernel(out, input);
  if (std::strcmp(instruction_set(), "avx2") == 0) return avx2::sum_kernel(out, input);
#endif
  return generic::sum_kernel(out, input);
}

}  // namespace fused_ema::cpu
