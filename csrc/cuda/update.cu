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
struct LaunchUpdate {
  static Status run(const Work& work, Momentum momentum, Stream stream) {
    using Op = Update<kForm, A, B>;
    const typename Op::Args args{coefficients<A, B>(momentum.value, AlphaRounding::kNone),
                                 momentum.device};
    return launch<Op>(work, args, stream);
  }
};

}  // namespace

Status launch_update(DtypePair pair, Form form, const Work& work, Momentum momentum,
                     Stream stream) {
  return launch_by_pair<LaunchUpdate>(pair, form, work, momentum, stream);
}

}  // namespace fused_ema::cuda
