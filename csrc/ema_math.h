// The arithmetic, once, for host and device: dtype conversions, coefficients and the three forms.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype_pairs.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Forced inlining also keeps these out of the symbol table: the files of csrc/cpu/ are compiled
// once per instruction set, and a shared inline copy could come from the widest one.
#define FUSED_EMA_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_EMA_INLINE __attribute__((always_inline)) inline
#endif

namespace fused_ema {

// ---- Conversions. Round to nearest even; a NaN becomes the quiet NaN that c10 writes.

template <typename To, typename From>
FUSED_EMA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FUSED_EMA_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

FUSED_EMA_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t bits;
  if (exponent == 0x0f800000u) {
    // Infinity, or a NaN made quiet as the hardware conversions make it.
    bits = magnitude + 0x70000000u;
    if ((magnitude & 0x007fffffu) != 0) bits |= 0x00400000u;
  } else if (exponent == 0) {
    // Subnormal: 2^-14 * (1 + f) less 2^-14, which is exact.
    bits = bit_cast<uint32_t>(bit_cast<float>(magnitude + 0x38800000u) -
                              bit_cast<float>(static_cast<uint32_t>(0x38800000u)));
  } else {
    bits = magnitude + 0x38000000u;
  }
  return bit_cast<float>(bits | sign);
#endif
}

FUSED_EMA_INLINE BFloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
}

FUSED_EMA_INLINE Half to_half(float x) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t out;
  if (magnitude >= 0x47800000u) {
    // 65536 and more, infinity, or NaN (with the top of its payload, made quiet).
    const bool is_nan = magnitude > 0x7f800000u;
    out = is_nan ? (0x7e00u | ((magnitude >> 13) & 0x03ffu)) : 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float unit round at fp16's last place, 2^-24.
    out = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<uint16_t>(out | sign)};
#endif
}

// Arithmetic runs in fp32, or in fp64 for fp64.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

FUSED_EMA_INLINE float load(float x) { return x; }
FUSED_EMA_INLINE double load(double x) { return x; }
FUSED_EMA_INLINE float load(BFloat16 x) { return to_float(x); }
FUSED_EMA_INLINE float load(Half x) { return to_float(x); }

template <typename T>
struct Stored {
  FUSED_EMA_INLINE static T from(T x) { return x; }
};
template <>
struct Stored<BFloat16> {
  FUSED_EMA_INLINE static BFloat16 from(float x) { return to_bfloat16(x); }
  FUSED_EMA_INLINE static BFloat16 from(BFloat16 x) { return x; }
};
template <>
struct Stored<Half> {
  FUSED_EMA_INLINE static Half from(float x) { return to_half(x); }
  FUSED_EMA_INLINE static Half from(Half x) { return x; }
};

// Between storage types. The same type moves as bits, so NaN payloads survive copy and swap.
template <typename To, typename From>
struct Converted {
  FUSED_EMA_INLINE static To from(From x) { return Stored<To>::from(load(x)); }
};
template <typename T>
struct Converted<T, T> {
  FUSED_EMA_INLINE static T from(T x) { return x; }
};

// ---- Coefficients of one update.

enum class Form : uint8_t { kLerp, kMulAdd, kTwoProducts };

// How mul_add rounds alpha = m when the ema is bf16 or fp16. Torch rounds it to the tensor's dtype
// on the CPU (measured, torch 2.13) and keeps it in fp32 on CUDA (torchgen's ufunc functors).
enum class AlphaRounding : uint8_t { kToEmaDtype, kNone };

template <typename C>
struct Coefficients {
  C momentum;       // mul_add: alpha; two_products: m
  C decay;          // both: 1 - m, formed in double
  C weight;         // lerp: m, or -(1 - m) where the formula starts from the param
  bool from_param;  // lerp: m >= 0.5
};

template <typename EmaT, typename ParamT>
FUSED_EMA_INLINE Coefficients<Compute<EmaT>> coefficients(double momentum, AlphaRounding rounding) {
  using C = Compute<EmaT>;
  Coefficients<C> c;
  const C m = static_cast<C>(momentum);
  c.momentum = m;
  // A mixed pair promotes to the ema's fp32, so only a pair of one narrow dtype rounds alpha.
  if (rounding == AlphaRounding::kToEmaDtype && sizeof(EmaT) == sizeof(ParamT)) {
    c.momentum = static_cast<C>(load(Stored<EmaT>::from(m)));
  }
  c.decay = static_cast<C>(1.0 - momentum);
  // torch.lerp tests and subtracts in the compute dtype, not in double (ATen/native/Lerp.h).
  c.from_param = !(m < static_cast<C>(0.5));
  c.weight = c.from_param ? -(static_cast<C>(1) - m) : m;
  return c;
}

// ---- The three forms. V is a scalar, or a vector type of csrc/cpu/simd.h with the same operators.

#if defined(__CUDA_ARCH__)
FUSED_EMA_INLINE float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
FUSED_EMA_INLINE double fma(double x, double y, double z) { return __fma_rn(x, y, z); }
// A product that nvcc makes no FMA of; g++ is told so by -ffp-contract=off.
FUSED_EMA_INLINE float product(float x, float y) { return __fmul_rn(x, y); }
FUSED_EMA_INLINE double product(double x, double y) { return __dmul_rn(x, y); }
#else
template <typename V>
FUSED_EMA_INLINE V product(V x, V y) {
  return x * y;
}
FUSED_EMA_INLINE float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
FUSED_EMA_INLINE double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
#endif

// ema + m * (p - ema), or p - (1 - m) * (p - ema) for m >= 0.5: torch.lerp's formula, one rounding
// in the difference and one in the FMA. A param equal to its ema leaves it unchanged.
template <bool kFromParam, typename V, typename C>
FUSED_EMA_INLINE V lerp_from(V ema, V param, const Coefficients<C>& c) {
  return fma(V(c.weight), param - ema, kFromParam ? param : ema);
}
template <typename V, typename C>
FUSED_EMA_INLINE V lerp(V ema, V param, const Coefficients<C>& c) {
  return c.from_param ? lerp_from<true>(ema, param, c) : lerp_from<false>(ema, param, c);
}

// ema.mul_(1 - m).add_(p, alpha=m): the product rounded to the ema's dtype, then one FMA.
template <typename V, typename C, typename RoundToEma>
FUSED_EMA_INLINE V mul_add(V ema, V param, const Coefficients<C>& c, RoundToEma round_to_ema) {
  return fma(V(c.momentum), param, round_to_ema(ema * V(c.decay)));
}

// (1 - m) * ema + m * p in three operations of torch: each product rounded to its own tensor's
// dtype, then the sum. The same in torch's vectors and tails, on the CPU and on CUDA.
template <typename V, typename C, typename RoundToEma, typename RoundToParam>
FUSED_EMA_INLINE V two_products(V ema, V param, const Coefficients<C>& c, RoundToEma round_to_ema,
                                RoundToParam round_to_param) {
  return round_to_ema(product(ema, V(c.decay))) + round_to_param(product(param, V(c.momentum)));
}

// What torch's CPU loop does instead for a bf16 or fp16 ema, in the elements that it takes one at a
// time: m * p is rounded to the dtype as well, and there is no FMA (measured, torch 2.13).
template <typename EmaT>
FUSED_EMA_INLINE EmaT mul_add_one_at_a_time(EmaT ema, EmaT param, const Coefficients<float>& c) {
  const float decayed = load(Stored<EmaT>::from(load(ema) * c.decay));
  const float added = load(Stored<EmaT>::from(load(param) * c.momentum));
  return Stored<EmaT>::from(decayed + added);
}

}  // namespace fused_ema
