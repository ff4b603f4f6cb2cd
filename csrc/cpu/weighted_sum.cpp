// out += the sum of weights[k] * inputs[k]
#include "weighted_sum.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {
namespace {

// Sums that stay in the first cache (16 KB) while all inputs are added to them.
constexpr int64_t kTile = 2048;
// Inputs that are read side by side: their weights, addresses and sums fit the registers.
constexpr int kSideBySide = 8;

#if defined(__AVX512F__)
FUSED_EMA_INLINE F64 low_half(F32 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)); }
FUSED_EMA_INLINE F64 high_half(F32 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)); }
#elif defined(__AVX2__)
FUSED_EMA_INLINE F64 low_half(F32 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)); }
FUSED_EMA_INLINE F64 high_half(F32 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)); }
#endif

// Adds kNum inputs from element `first` on to n sums.
template <int kNum, typename In>
void add(double* __restrict__ sums, const void* const* inputs, const double* weights, int64_t first,
         int64_t n) {
  const In* x[kNum];
  for (int k = 0; k < kNum; ++k) x[k] = static_cast<const In*>(inputs[k]) + first;
  int64_t i = 0;
#if defined(__AVX2__)
  constexpr int kLanes = VecOf<In>::type::kLanes;
  for (; i + kLanes <= n; i += kLanes) {
    if constexpr (std::is_same_v<In, double>) {
      F64 sum = load_vec(sums + i);
#pragma GCC unroll 8
      for (int k = 0; k < kNum; ++k) sum = fma(F64(weights[k]), load_vec(x[k] + i), sum);
      store_vec(sums + i, sum);
    } else {
      F64 low = load_vec(sums + i);
      F64 high = load_vec(sums + i + kLanes / 2);
#pragma GCC unroll 8
      for (int k = 0; k < kNum; ++k) {
        const F64 weight(weights[k]);
        const F32 value = load_vec(x[k] + i);
        low = fma(weight, low_half(value), low);
        high = fma(weight, high_half(value), high);
      }
      store_vec(sums + i, low);
      store_vec(sums + i + kLanes / 2, high);
    }
  }
#endif
  for (; i < n; ++i) {
    double sum = sums[i];
    for (int k = 0; k < kNum; ++k) sum = __builtin_fma(weights[k], double{load(x[k][i])}, sum);
    sums[i] = sum;
  }
}

template <typename In, int kNum = kSideBySide>
void add_some(int num, double* sums, const void* const* inputs, const double* weights,
              int64_t first, int64_t n) {
  if (num == kNum) {
    add<kNum, In>(sums, inputs, weights, first, n);
  } else if constexpr (kNum > 1) {
    add_some<In, kNum - 1>(num, sums, inputs, weights, first, n);
  }
}

template <typename Out, typename In>
void run(const WeightedSum& sum, int64_t begin, int64_t end) {
  double own[kTile];
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t n = std::min(kTile, end - first);
    Out* const out = static_cast<Out*>(sum.out) + first;
    double* sums = own;
    if constexpr (std::is_same_v<Out, double>) {
      sums = out;
    } else {
      for (int64_t i = 0; i < n; ++i) sums[i] = double{out[i]};
    }
    for (int k = 0; k < sum.num_inputs; k += kSideBySide) {
      const int num = std::min(kSideBySide, sum.num_inputs - k);
      add_some<In>(num, sums, sum.inputs + k, sum.weights + k, first, n);
    }
    if constexpr (!std::is_same_v<Out, double>) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Out>(sums[i]);
    }
  }
}

}  // namespace

SumKernel sum_kernel(Dtype out, Dtype input) {
#define FUSED_EMA_CASE(Out, In) \
  if (out == DtypeOf<Out>::value && input == DtypeOf<In>::value) return run<Out, In>;
  FUSED_EMA_FOR_EACH_SUM(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  return nullptr;
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
