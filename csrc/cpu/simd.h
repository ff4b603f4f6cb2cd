// Vectors of fp32 and fp64 for the instruction set that this file is compiled for. The build
// compiles csrc/cpu/{update,swap,copy}.cpp once per instruction set, each with its own
// FUSED_EMA_ISA, so every name here lives in that namespace and none is shared between two sets.
#pragma once

#include <cstdint>

#include "../dtype_pairs.h"
#include "../ema_math.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fused_ema::cpu::FUSED_EMA_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;
  FUSED_EMA_INLINE F32(__m512 x) : v(x) {}
  FUSED_EMA_INLINE explicit F32(float x) : v(_mm512_set1_ps(x)) {}
};
FUSED_EMA_INLINE F32 operator+(F32 x, F32 y) { return _mm512_add_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 operator-(F32 x, F32 y) { return _mm512_sub_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 operator*(F32 x, F32 y) { return _mm512_mul_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 fma(F32 x, F32 y, F32 z) { return _mm512_fmadd_ps(x.v, y.v, z.v); }

struct F64 {
  static constexpr int kLanes = 8;
  __m512d v;
  FUSED_EMA_INLINE F64(__m512d x) : v(x) {}
  FUSED_EMA_INLINE explicit F64(double x) : v(_mm512_set1_pd(x)) {}
};
FUSED_EMA_INLINE F64 operator+(F64 x, F64 y) { return _mm512_add_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 operator-(F64 x, F64 y) { return _mm512_sub_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 operator*(F64 x, F64 y) { return _mm512_mul_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 fma(F64 x, F64 y, F64 z) { return _mm512_fmadd_pd(x.v, y.v, z.v); }

FUSED_EMA_INLINE F32 load_vec(const float* p) { return _mm512_loadu_ps(p); }
FUSED_EMA_INLINE F64 load_vec(const double* p) { return _mm512_loadu_pd(p); }

FUSED_EMA_INLINE void store_vec(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
FUSED_EMA_INLINE void store_vec(double* p, F64 x) { _mm512_storeu_pd(p, x.v); }

// Sixteen bits an element.
FUSED_EMA_INLINE __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
FUSED_EMA_INLINE void store_bits(void* p, __m256i bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
}
FUSED_EMA_INLINE void stream_bits(void* p, __m256i bits) {
  _mm256_stream_si256(static_cast<__m256i*>(p), bits);
}
FUSED_EMA_INLINE F32 widened(BFloat16, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FUSED_EMA_INLINE F32 widened(Half, __m256i bits) { return _mm512_cvtph_ps(bits); }
FUSED_EMA_INLINE __m256i narrowed(BFloat16, F32 x) {
  // to_bfloat16 of ema_math.h; vcvtneps2bf16 would flush subnormals.
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}
FUSED_EMA_INLINE __m256i narrowed(Half, F32 x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Past the caches, to an address aligned to what is written.
FUSED_EMA_INLINE void stream_vec(float* p, F32 x) { _mm512_stream_ps(p, x.v); }
FUSED_EMA_INLINE void end_of_stream() { _mm_sfence(); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct F32 {
  static constexpr int kLanes = 8;
  __m256 v;
  FUSED_EMA_INLINE F32(__m256 x) : v(x) {}
  FUSED_EMA_INLINE explicit F32(float x) : v(_mm256_set1_ps(x)) {}
};
FUSED_EMA_INLINE F32 operator+(F32 x, F32 y) { return _mm256_add_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 operator-(F32 x, F32 y) { return _mm256_sub_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 operator*(F32 x, F32 y) { return _mm256_mul_ps(x.v, y.v); }
FUSED_EMA_INLINE F32 fma(F32 x, F32 y, F32 z) { return _mm256_fmadd_ps(x.v, y.v, z.v); }

struct F64 {
  static constexpr int kLanes = 4;
  __m256d v;
  FUSED_EMA_INLINE F64(__m256d x) : v(x) {}
  FUSED_EMA_INLINE explicit F64(double x) : v(_mm256_set1_pd(x)) {}
};
FUSED_EMA_INLINE F64 operator+(F64 x, F64 y) { return _mm256_add_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 operator-(F64 x, F64 y) { return _mm256_sub_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 operator*(F64 x, F64 y) { return _mm256_mul_pd(x.v, y.v); }
FUSED_EMA_INLINE F64 fma(F64 x, F64 y, F64 z) { return _mm256_fmadd_pd(x.v, y.v, z.v); }

FUSED_EMA_INLINE F32 load_vec(const float* p) { return _mm256_loadu_ps(p); }
FUSED_EMA_INLINE F64 load_vec(const double* p) { return _mm256_loadu_pd(p); }

FUSED_EMA_INLINE void store_vec(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
FUSED_EMA_INLINE void store_vec(double* p, F64 x) { _mm256_storeu_pd(p, x.v); }

// Sixteen bits an element.
FUSED_EMA_INLINE __m128i load_bits(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FUSED_EMA_INLINE void store_bits(void* p, __m128i bits) {
  _mm_storeu_si128(static_cast<__m128i*>(p), bits);
}
FUSED_EMA_INLINE void stream_bits(void* p, __m128i bits) {
  _mm_stream_si128(static_cast<__m128i*>(p), bits);
}
FUSED_EMA_INLINE F32 widened(BFloat16, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FUSED_EMA_INLINE F32 widened(Half, __m128i bits) { return _mm256_cvtph_ps(bits); }
FUSED_EMA_INLINE __m128i narrowed(BFloat16, F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
FUSED_EMA_INLINE __m128i narrowed(Half, F32 x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FUSED_EMA_INLINE void stream_vec(float* p, F32 x) { _mm256_stream_ps(p, x.v); }
FUSED_EMA_INLINE void end_of_stream() { _mm_sfence(); }

#else

// One lane: loop.h then takes every element with scalar(), and the compiler vectorises what it can
// (NEON on arm64). Without an FMA unit the FMA is libm's, slow and exact.
struct F32 {
  static constexpr int kLanes = 1;
};
struct F64 {
  static constexpr int kLanes = 1;
};
FUSED_EMA_INLINE void end_of_stream() {}

#endif

// bf16 and fp16, through the bits of a vector of them.
template <typename T>
FUSED_EMA_INLINE F32 load_vec(const T* p) {
  return widened(T{}, load_bits(p));
}
template <typename T>
FUSED_EMA_INLINE void store_vec(T* p, F32 x) {
  store_bits(p, narrowed(T{}, x));
}
template <typename T>
FUSED_EMA_INLINE void stream_vec(T* p, F32 x) {
  stream_bits(p, narrowed(T{}, x));
}
template <typename T>
FUSED_EMA_INLINE F32 rounded_to(T, F32 x) {
  return widened(T{}, narrowed(T{}, x));
}

// An ema that is as wide as the arithmetic needs no rounding in between.
FUSED_EMA_INLINE F32 rounded_to(float, F32 x) { return x; }
FUSED_EMA_INLINE F64 rounded_to(double, F64 x) { return x; }

template <typename T>
struct VecOf {
  using type = F32;
};
template <>
struct VecOf<double> {
  using type = F64;
};

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
