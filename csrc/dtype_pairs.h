// The dtypes, and the (ema, param) dtype pairs that have kernels, as one list.
// Everything that exists once per pair is generated from FUSED_EMA_FOR_EACH_PAIR.
#pragma once

#include <cstdint>

namespace fused_ema {

// Storage only; ema_math.h converts. Not torch's types, so that kernels need no torch header.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// X(name, ema type, param type). The ema is as wide as the param or wider, so "a" is the wide side
// of a pair everywhere in csrc/ and swap_ and copy_ exchange their lists to fit where needed.
#define FUSED_EMA_FOR_EACH_PAIR(X)         \
  X(kFloat32Float32, float, float)         \
  X(kFloat32BFloat16, float, BFloat16)     \
  X(kFloat32Float16, float, Half)          \
  X(kFloat64Float64, double, double)       \
  X(kBFloat16BFloat16, BFloat16, BFloat16) \
  X(kFloat16Float16, Half, Half)

enum class DtypePair : uint8_t {
#define FUSED_EMA_NAME(name, A, B) name,
  FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_NAME)
#undef FUSED_EMA_NAME
};

#define FUSED_EMA_COUNT(name, A, B) +1
constexpr int kNumDtypePairs = 0 FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_COUNT);
#undef FUSED_EMA_COUNT

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kFloat64;
};
template <>
struct DtypeOf<BFloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<Half> {
  static constexpr Dtype value = Dtype::kFloat16;
};

constexpr int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

struct PairDtypes {
  Dtype a, b;
};

constexpr PairDtypes kPairDtypes[] = {
#define FUSED_EMA_DTYPES(name, A, B) {DtypeOf<A>::value, DtypeOf<B>::value},
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_DTYPES)
#undef FUSED_EMA_DTYPES
};

constexpr PairDtypes dtypes_of(DtypePair pair) { return kPairDtypes[static_cast<int>(pair)]; }

}  // namespace fused_ema
