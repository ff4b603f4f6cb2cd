// The loop over one run of elements that every CPU operation shares. An operation gives
//   vectors(a, b)   one vector at a and b: load, compute, store
//   scalar(a, b)    one element, for the tail
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {

template <typename Op, typename A, typename B>
FUSED_EMA_INLINE void run_span(const Op& op, A* __restrict__ a, B* __restrict__ b, int64_t n) {
  constexpr int kLanes = VecOf<A>::type::kLanes;
  int64_t i = 0;
  if constexpr (kLanes > 1) {
    // Unrolled by hand: an out-of-order core then has several independent loads in its window.
    constexpr int kUnroll = 4;
    for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) op.vectors(a + i + u * kLanes, b + i + u * kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) op.vectors(a + i, b + i);
  }
  for (; i < n; ++i) op.scalar(a + i, b + i);
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
