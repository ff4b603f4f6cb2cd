// Device only. One element of an update, of one average or of several.
#pragma once

#include "launch.cuh"

namespace fused_ema::cuda {

template <Form kForm, typename A, typename B>
__device__ __forceinline__ void move(A& ema, const B& param, const Coefficients<Compute<A>>& c) {
  if constexpr (kForm == Form::kLerp) {
    ema = Stored<A>::from(lerp(load(ema), static_cast<Compute<A>>(load(param)), c));
  } else if constexpr (kForm == Form::kTwoProducts) {
    ema = Stored<A>::from(two_products(
        load(ema), static_cast<Compute<A>>(load(param)), c,
        [](Compute<A> x) { return Compute<A>{load(Stored<A>::from(x))}; },
        [](Compute<A> x) { return Compute<A>{load(Stored<B>::from(x))}; }));
  } else {
    ema = Stored<A>::from(mul_add(load(ema), static_cast<Compute<A>>(load(param)), c,
                                  [](Compute<A> x) { return load(Stored<A>::from(x)); }));
  }
}

}  // namespace fused_ema::cuda
