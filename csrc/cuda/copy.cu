// One-way copy with dtype conversion, in either direction of a pair.
#include "launch.cuh"

namespace fused_ema::cuda {
namespace {

template <bool kToA, typename A, typename B>
struct Copy : SidesOf<A, B> {
  static constexpr int kReads = kToA ? 0b10 : 0b01, kWrites = kToA ? 0b01 : 0b10;
  // Half a vector of a mixed pair's param in steps of one is too little on its way.
  static constexpr Walk kWalk = sizeof(A) == sizeof(B) ? Walk{256, 1, 8} : Walk{256, 2, 5};
  struct Args {};
  static constexpr bool is_idle = false;
  __device__ explicit Copy(const Args&) {}

  __device__ void operator()(A& a, B& b) const {
    if constexpr (kToA) {
      a = Converted<A, B>::from(b);
    } else {
      b = Converted<B, A>::from(a);
    }
  }
};

}  // namespace

Status launch_copy(DtypePair pair, bool to_a, const Work& work, Stream stream) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B)                           \
  case DtypePair::name:                                      \
    return to_a ? launch<Copy<true, A, B>>(work, {}, stream) \
                : launch<Copy<false, A, B>>(work, {}, stream);
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_ema::cuda
