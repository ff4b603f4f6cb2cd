// One-way copy with dtype conversion, in either direction of a pair.
#include <cstring>
#include <type_traits>

#include "loop.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {
namespace {

template <typename To, typename From>
struct Copy {
  FUSED_EMA_INLINE void vectors(To* to, const From* from) const { store_vec(to, load_vec(from)); }
  FUSED_EMA_INLINE void scalar(To* to, const From* from) const {
    *to = Converted<To, From>::from(*from);
  }
};

template <typename To, typename From>
void run(To* to, From* from, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    // libc chooses the instructions by size, streaming stores for the largest ones included.
    std::memcpy(to, from, n * sizeof(To));
  } else {
    run_span(Copy<To, From>{}, to, from, n);
  }
}

template <bool kToA, typename A, typename B>
void run_pair(double, void* a, void* b, int64_t n) {
  if constexpr (kToA) {
    run(static_cast<A*>(a), static_cast<B*>(b), n);
  } else {
    run(static_cast<B*>(b), static_cast<A*>(a), n);
  }
}

}  // namespace

SpanKernel copy_kernel(DtypePair pair, bool to_a) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return to_a ? run_pair<true, A, B> : run_pair<false, A, B>;
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return nullptr;
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
