// Exchanges the two sides, through registers: no temporary memory.
#include <cstring>
#include <type_traits>

#include "loop.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {
namespace {

template <typename A, typename B>
struct Swap {
  using V = typename VecOf<A>::type;

  FUSED_EMA_INLINE void vectors(A* a, B* b) const {
    const V x = load_vec(a);
    const V y = load_vec(b);
    store_vec(a, y);
    store_vec(b, x);
  }
  FUSED_EMA_INLINE void scalar(A* a, B* b) const {
    // By memcpy: words of 2-byte elements may be misaligned.
    A x;
    B y;
    std::memcpy(&x, a, sizeof(A));
    std::memcpy(&y, b, sizeof(B));
    const A new_a = Converted<A, B>::from(y);
    const B new_b = Converted<B, A>::from(x);
    std::memcpy(a, &new_a, sizeof(A));
    std::memcpy(b, &new_b, sizeof(B));
  }
};

template <typename A, typename B>
void run(double, void* a, void* b, int64_t n) {
  if constexpr (std::is_same_v<A, B> && sizeof(A) == 2) {
    // Two elements as one fp32 word that is moved and never computed with, so that no bit of a NaN
    // is lost in a conversion.
    run_span(Swap<float, float>{}, static_cast<float*>(a), static_cast<float*>(b), n / 2);
    if (n % 2 != 0) Swap<A, B>{}.scalar(static_cast<A*>(a) + n - 1, static_cast<B*>(b) + n - 1);
  } else {
    run_span(Swap<A, B>{}, static_cast<A*>(a), static_cast<B*>(b), n);
  }
}

}  // namespace

SpanKernel swap_kernel(DtypePair pair) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return run<A, B>;
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return nullptr;
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
