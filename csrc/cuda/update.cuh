// Device only. One element of an update, of one average or of several.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace fused_ema::cuda {

// What one average goes by.
template <Form kForm, typename A, typename B>
struct Weights {
  template <typename T>
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  using Mask = Bits<Compute<A>>;

  Coefficients<Compute<A>> c;
  // Of a momentum in device memory 0 is no update and 1 a copy, to the last bit: 0 * inf is NaN.
  bool is_idle = false;
  // As a mask; of 16 bits nvcc would make more of it.
  Mask averaged_bits = ~Mask{0};

  __device__ void set(const Coefficients<Compute<A>>& by_value, const double* in_memory) {
    c = by_value;
    if (in_memory == nullptr) return;
    const double momentum = *in_memory;
    c = coefficients<A, B>(momentum, AlphaRounding::kNone);
    is_idle = momentum == 0;
    if (momentum == 1) averaged_bits = 0;
  }

  __device__ void move(A& ema, const B& param) const {
    // Not by ?:, of which nvcc makes branches, and loads would wait behind them.
    const auto averaged = bit_cast<Bits<A>>(average(ema, param));
    const auto copied = bit_cast<Bits<A>>(Converted<A, B>::from(param));
    ema = bit_cast<A>(static_cast<Bits<A>>((averaged & averaged_bits) | (copied & ~averaged_bits)));
  }

  __device__ A average(A ema, B param) const {
    if constexpr (kForm == Form::kLerp) {
      return Stored<A>::from(lerp(load(ema), static_cast<Compute<A>>(load(param)), c));
    } else if constexpr (kForm == Form::kTwoProducts) {
      return Stored<A>::from(two_products(
          load(ema), static_cast<Compute<A>>(load(param)), c,
          [](Compute<A> x) { return Compute<A>{load(Stored<A>::from(x))}; },
          [](Compute<A> x) { return Compute<A>{load(Stored<B>::from(x))}; }));
    } else {
      return Stored<A>::from(mul_add(load(ema), static_cast<Compute<A>>(load(param)), c,
                                     [](Compute<A> x) { return load(Stored<A>::from(x)); }));
    }
  }
};

// Calls Launch<form, A, B>::run with the rest.
template <template <Form, typename, typename> class Launch, typename A, typename B,
          typename... Args>
Status launch_by_form(Form form, const Args&... args) {
  switch (form) {
    case Form::kLerp:
      return Launch<Form::kLerp, A, B>::run(args...);
    case Form::kMulAdd:
      return Launch<Form::kMulAdd, A, B>::run(args...);
    case Form::kTwoProducts:
      return Launch<Form::kTwoProducts, A, B>::run(args...);
  }
  return cudaErrorInvalidValue;
}
template <template <Form, typename, typename> class Launch, typename... Args>
Status launch_by_pair(DtypePair pair, Form form, const Args&... args) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return launch_by_form<Launch, A, B>(form, args...);
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_ema::cuda
