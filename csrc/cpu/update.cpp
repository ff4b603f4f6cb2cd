// ema = (1 - m) * ema + m * param
#include "loop.h"

namespace fused_ema::cpu::FUSED_EMA_ISA {
namespace {

// kFromParam: where lerp starts (Coefficients::from_param), chosen once a span. Asked in the loop,
// g++ 12 answers by way of memory: two stores and a load more for every vector.
template <Form kForm, bool kFromParam, typename A, typename B>
struct Update {
  using V = typename VecOf<A>::type;
  using C = Compute<A>;
  Coefficients<C> c;

  FUSED_EMA_INLINE void vectors(A* ema, const B* param) const {
    const V e = load_vec(ema);
    const V p = load_vec(param);
    if constexpr (kForm == Form::kLerp) {
      store_vec(ema, lerp_from<kFromParam>(e, p, c));
    } else if constexpr (kForm == Form::kTwoProducts) {
      store_vec(ema, two_products(
                         e, p, c, [](V x) { return rounded_to(A{}, x); },
                         [](V x) { return rounded_to(B{}, x); }));
    } else {
      store_vec(ema, mul_add(e, p, c, [](V x) { return rounded_to(A{}, x); }));
    }
  }
  FUSED_EMA_INLINE void scalar(A* ema, const B* param) const {
    const C e = load(*ema);
    const C p = load(*param);
    if constexpr (kForm == Form::kLerp) {
      *ema = Stored<A>::from(lerp_from<kFromParam>(e, p, c));
    } else if constexpr (kForm == Form::kTwoProducts) {
      *ema = Stored<A>::from(two_products(
          e, p, c, [](C x) { return C{load(Stored<A>::from(x))}; },
          [](C x) { return C{load(Stored<B>::from(x))}; }));
    } else {
      *ema = Stored<A>::from(mul_add(e, p, c, [](C x) { return load(Stored<A>::from(x)); }));
    }
  }
};

template <Form kForm, typename A, typename B>
void run(double momentum, void* a, void* b, int64_t n) {
  constexpr auto kRounding =
      kForm == Form::kMulAdd ? AlphaRounding::kToEmaDtype : AlphaRounding::kNone;
  const Coefficients<Compute<A>> c = coefficients<A, B>(momentum, kRounding);
  A* ema = static_cast<A*>(a);
  const B* param = static_cast<const B*>(b);
  if (kForm == Form::kLerp && c.from_param) {
    run_span(Update<kForm, true, A, B>{c}, ema, param, n);
  } else {
    run_span(Update<kForm, false, A, B>{c}, ema, param, n);
  }
}

template <typename T>
void run_one_at_a_time(double momentum, void* a, void* b, int64_t n) {
  const Coefficients<float> c = coefficients<T, T>(momentum, AlphaRounding::kToEmaDtype);
  T* ema = static_cast<T*>(a);
  const T* param = static_cast<const T*>(b);
  for (int64_t i = 0; i < n; ++i) ema[i] = mul_add_one_at_a_time(ema[i], param[i], c);
}

template <typename A, typename B>
SpanKernel kernel_of(Form form) {
  switch (form) {
    case Form::kLerp:
      return run<Form::kLerp, A, B>;
    case Form::kMulAdd:
      return run<Form::kMulAdd, A, B>;
    case Form::kTwoProducts:
      return run<Form::kTwoProducts, A, B>;
  }
  return nullptr;
}

}  // namespace

SpanKernel one_at_a_time_kernel(DtypePair pair) {
  if (pair == DtypePair::kBFloat16BFloat16) return run_one_at_a_time<BFloat16>;
  if (pair == DtypePair::kFloat16Float16) return run_one_at_a_time<Half>;
  return nullptr;
}

SpanKernel update_kernel(DtypePair pair, Form form) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return kernel_of<A, B>(form);
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return nullptr;
}

}  // namespace fused_ema::cpu::FUSED_EMA_ISA
