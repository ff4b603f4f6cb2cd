// ema_k = (1 - m_k) * ema_k + m_k * param, for two to four averages in one pass over the params
#include "update.cuh"

namespace fused_ema::cuda {
namespace {

static_assert(kMostAverages == 4, "UpdateAverages has four");

template <Form kForm, typename A, typename B>
struct UpdateAverages {
  using Types = Sides<A, A, A, A, B>;
  static constexpr int kReads = 0b11111, kWrites = 0b01111;
  // Each thread has five vectors on their way, so that fewer threads keep the memory as busy.
  static constexpr Walk kWalk{128, 1, 4};
  struct Args {
    Coefficients<Compute<A>> by_value[kMostAverages];
    const double* momenta;
    int count;
  };
  Weights<kForm, A, B> weights[kMostAverages];
  bool is_idle = true;
  int count;

  __device__ explicit UpdateAverages(const Args& args) : count(args.count) {
#pragma unroll
    for (int k = 0; k < kMostAverages; ++k) {
      const bool is_there = k < 2 || k < count;
      const bool in_memory = args.momenta != nullptr && is_there;
      weights[k].set(args.by_value[k], in_memory ? args.momenta + k : nullptr);
      if (is_there && !weights[k].is_idle) is_idle = false;
    }
  }

  template <int kSide>
  __device__ bool takes() const {
    if constexpr (kSide == kMostAverages) {
      return true;
    } else {
      return (kSide < 2 || kSide < count) && !weights[kSide].is_idle;
    }
  }

  __device__ void operator()(A& e0, A& e1, A& e2, A& e3, const B& param) const {
    weights[0].move(e0, param);
    weights[1].move(e1, param);
    weights[2].move(e2, param);
    weights[3].move(e3, param);
  }
};

template <Form kForm, typename A, typename B>
struct LaunchUpdateAverages {
  static Status run(const AveragesWork& work, Momenta momenta, Stream stream) {
    using Op = UpdateAverages<kForm, A, B>;
    typename Op::Args args{{}, momenta.device, momenta.count};
    for (int k = 0; k < momenta.count; ++k) {
      const double momentum = momenta.device == nullptr ? momenta.values[k] : 0.0;
      args.by_value[k] = coefficients<A, B>(momentum, AlphaRounding::kNone);
    }
    return launch<Op>(work, args, stream);
  }
};

}  // namespace

Status launch_update_averages(DtypePair pair, Form form, const AveragesWork& work, Momenta momenta,
                              Stream stream) {
  return launch_by_pair<LaunchUpdateAverages>(pair, form, work, momenta, stream);
}

}  // namespace fused_ema::cuda
