// ema = (1 - m) * ema + m * param
#include <type_traits>

#include "launch.cuh"

namespace fused_ema::cuda {
namespace {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <Form kForm, typename A, typename B>
struct Update {
  static constexpr bool kReadsA = true, kReadsB = true, kWritesA = true, kWritesB = false;
  // fp64 takes more registers where params are misaligned.
  static constexpr Walk kWalk{256, 1, sizeof(A) == 8 ? 4 : 6};
  struct Args {
    Coefficients<Compute<A>> by_value;
    const double* momentum;
  };
  using Mask = Bits<Compute<A>>;
  Coefficients<Compute<A>> c;
  // Of a momentum in device memory 0 is no update and 1 a copy, to the last bit: 0 * inf is NaN.
  bool is_idle = false;
  // As a mask; of 16 bits nvcc would make more of it.
  Mask averaged_bits = ~Mask{0};

  __device__ explicit Update(const Args& args) : c(args.by_value) {
    if (args.momentum == nullptr) return;
    const double momentum = *args.momentum;
    c = coefficients<A, B>(momentum, AlphaRounding::kNone);
    is_idle = momentum == 0;
    if (momentum == 1) averaged_bits = 0;
  }

  __device__ void operator()(A& ema, const B& param) const {
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

template <Form kForm, typename A, typename B>
Status launch_form(const Work& work, Momentum momentum, Stream stream) {
  using Op = Update<kForm, A, B>;
  const typename Op::Args args{coefficients<A, B>(momentum.value, AlphaRounding::kNone),
                               momentum.device};
  return launch<Op, A, B>(work, args, stream);
}

template <typename A, typename B>
Status launch_pair(Form form, const Work& work, Momentum momentum, Stream stream) {
  switch (form) {
    case Form::kLerp:
      return launch_form<Form::kLerp, A, B>(work, momentum, stream);
    case Form::kMulAdd:
      return launch_form<Form::kMulAdd, A, B>(work, momentum, stream);
    case Form::kTwoProducts:
      return launch_form<Form::kTwoProducts, A, B>(work, momentum, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

Status launch_update(DtypePair pair, Form form, const Work& work, Momentum momentum,
                     Stream stream) {
  switch (pair) {
#define FUSED_EMA_CASE(name, A, B) \
  case DtypePair::name:            \
    return launch_pair<A, B>(form, work, momentum, stream);
    FUSED_EMA_FOR_EACH_PAIR(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_ema::cuda
