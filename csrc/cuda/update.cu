// ema = (1 - m) * ema + m * param
#include "update.cuh"

namespace fused_ema::cuda {
namespace {

template <Form kForm, typename A, typename B>
struct Update : SidesOf<A, B> {
  static constexpr int kReads = 0b11, kWrites = 0b01;
  // fp64 takes more registers where params are misaligned.
  static constexpr Walk kWalk{256, 1, sizeof(A) == 8 ? 4 : 6};
  struct Args {
    Coefficients<Compute<A>> by_value;
    const double* momentum;
  };
  Weights<kForm, A, B> weights;
  bool is_idle;

  __device__ explicit Update(const Args& args) {
    weights.set(args.by_value, args.momentum);
    is_idle = weights.is_idle;
  }

  __device__ void operator()(A& ema, const B& param) const { weights.move(ema, param); }
};

template <Form kForm, typename A, typename B>
Status launch_form(const Work& work, Momentum momentum, Stream stream) {
  using Op = Update<kForm, A, B>;
  const typename Op::Args args{coefficients<A, B>(momentum.value, AlphaRounding::kNone),
                               momentum.device};
  return launch<Op>(work, args, stream);
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
