// One-way copy with dtype conversion, in either direction of a pair. Streaming stores spare the
// read of a destination that is not in the caches: 8 bytes an fp32 element instead of 12.
#include <cstring>
#include <type_traits>

#include "loop.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {
namespace {

template <bool kStreaming, typename To, typename From>
struct Copy {
  FUSED_EMA_INLINE void vectors(To* to, const From* from) const {
    if constexpr (kStreaming) {
      stream_vec(to, load_vec(from));
    } else {
      store_vec(to, load_vec(from));
    }
  }
  FUSED_EMA_INLINE void scalar(To* to, const From* from) const {
    if constexpr (std::is_same_v<To, From>) {
      std::memcpy(to, from, sizeof(To));  // words of 2-byte elements may be misaligned
    } else {
      *to = Converted<To, From>::from(*from);
    }
  }
};

template <bool kStreaming, typename To, typename From>
void run(To* to, From* from, int64_t n) {
  if constexpr (!kStreaming && std::is_same_v<To, From>) {
    std::memcpy(to, from, n * sizeof(To));
  } else if constexpr (!kStreaming) {
    run_span(Copy<false, To, From>{}, to, from, n);
  } else if constexpr (std::is_same_v<To, From> && !std::is_same_v<To, float>) {
    // As fp32 words, which are moved and never computed with. A 2-byte element may be left over on
    // either side of them.
    const int64_t before = reinterpret_cast<uintptr_t>(to) % sizeof(float) / sizeof(To);
    const int64_t first = before < n ? before : n;
    const int64_t words = (n - first) * static_cast<int64_t>(sizeof(To)) / 4;
    const int64_t last = first + words * 4 / static_cast<int64_t>(sizeof(To));
    for (int64_t i = 0; i < first; ++i) to[i] = from[i];
    run<true>(reinterpret_cast<float*>(to + first), reinterpret_cast<float*>(from + first), words);
    for (int64_t i = last; i < n; ++i) to[i] = from[i];
  } else {
    constexpr int64_t kStored = F32::kLanes * sizeof(To);
    const Copy<true, To, From> copy;
    int64_t i = 0;
    for (; i < n && reinterpret_cast<uintptr_t>(to + i) % kStored != 0; ++i) {
      copy.scalar(to + i, from + i);
    }
    run_span(copy, to + i, from + i, n - i);
    end_of_stream();
  }
}

template <bool kStreaming, bool kToA, typename A, typename B>
void run_pair(double, void* a, void* b, int64_t n) {
  if constexpr (kToA) {
    run<kStreaming>(static_cast<A*>(a), static_cast<B*>(b), n);
  } else {
    run<kStreaming>(static_cast<B*>(b), static_cast<A*>(a), n);
  }
}

template <bool kStreaming, typename A, typename B>
SpanKernel kernel_to(bool to_a) {
  return to_a ? run_pair<kStreaming, true, A, B> : run_pair<kStreaming, false, A, B>;
}

}  // namespace

SpanKernel copy_kernel(DtypePair pair, bool to_a, bool streaming) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return streaming ? kernel_to<true, A, B>(to_a) : kernel_to<false, A, B>(to_a);
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return nullptr;
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
