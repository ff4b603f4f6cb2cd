// One table of kernels per instruction set; launch.cpp chooses at run time.
#pragma once

#include <cstdint>

#include "../dtype_pairs.h"
#include "../ema_math.h"

namespace fused_ema::cpu {

// Works on n elements at a and b. momentum is for update alone.
using SpanKernel = void (*)(double momentum, void* a, void* b, int64_t n);

// Per set, in csrc/cpu/{update,swap,copy}.cpp. one_at_a_time_kernel is mul_add as torch computes
// the elements outside of its vectors, and null where that is no different.
#define FUSED_EMA_DECLARE_KERNELS(isa)                               \
  namespace isa {                                                    \
  SpanKernel update_kernel(DtypePair pair, Form form);               \
  SpanKernel one_at_a_time_kernel(DtypePair pair);                   \
  SpanKernel swap_kernel(DtypePair pair);                            \
  SpanKernel copy_kernel(DtypePair pair, bool to_a, bool streaming); \
  }
FUSED_EMA_DECLARE_KERNELS(generic)
FUSED_EMA_DECLARE_KERNELS(avx2)
FUSED_EMA_DECLARE_KERNELS(avx512)
#undef FUSED_EMA_DECLARE_KERNELS

}  // namespace fused_ema::cpu
