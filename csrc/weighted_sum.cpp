// torch.ops.fused_ema.weighted_sum_: checks, and the launch on a device.
#include "weighted_sum.h"

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "cpu/weighted_sum.h"
#include "groups.h"
#include "parallel.h"
#ifdef FUSED_EMA_WITH_CUDA
#include "cuda/weighted_sum.h"
#endif

namespace fused_ema {
namespace {

constexpr const char* kTitle = "fused_ema.weighted_sum_: ";

void check(const at::Tensor& out, at::TensorList inputs, at::ArrayRef<double> weights) {
  TORCH_CHECK_VALUE(inputs.size() == weights.size(), kTitle, inputs.size(), " inputs but ",
                    weights.size(), " weights; pass one for each");
  const auto type = out.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, kTitle, "out is ", dtype_name(type),
                   "; it must be float32 or float64");
  TORCH_CHECK(!out.is_inference() || c10::InferenceMode::is_enabled(), kTitle,
              "out is an inference tensor; write to it in inference mode");
  const auto check_one = [&](const at::Tensor& tensor, const std::string& name) {
    TORCH_CHECK_TYPE(is_plain(tensor) && tensor.is_contiguous(), kTitle, name,
                     " isn't contiguous, or has no memory of its own; pass a contiguous copy");
    TORCH_CHECK_VALUE(tensor.device() == out.device() && tensor.sizes() == out.sizes(), kTitle,
                      name, " is on ", tensor.device(), " with shape ", tensor.sizes(),
                      " but out on ", out.device(), " with ", out.sizes(),
                      "; they must be the same");
  };
  check_one(out, "out");
  const auto* const out_begin = static_cast<const char*>(out.const_data_ptr());
  for (size_t k = 0; k < inputs.size(); ++k) {
    const at::Tensor& input = inputs[k];
    const std::string name = "inputs[" + std::to_string(k) + "]";
    check_one(input, name);
    TORCH_CHECK_TYPE(
        dtype_of(input.scalar_type()) && input.scalar_type() == inputs[0].scalar_type(), kTitle,
        name, " is ", dtype_name(input.scalar_type()),
        "; all must be one of float32, float64, bfloat16 and float16, as inputs[0] is ",
        dtype_name(inputs[0].scalar_type()));
    const auto* const begin = static_cast<const char*>(input.const_data_ptr());
    TORCH_CHECK_VALUE(begin + input.nbytes() <= out_begin || out_begin + out.nbytes() <= begin,
                      kTitle, "out overlaps ", name, "; write to memory of its own");
  }
}

void run(const at::Tensor& out, const WeightedSum& sum, Dtype to, Dtype from) {
#ifdef FUSED_EMA_WITH_CUDA
  if (out.is_cuda()) {
    const c10::DeviceGuard guard(out.device());
    const c10::Stream stream =
        c10::impl::VirtualGuardImpl(out.device().type()).getStream(out.device());
    const cuda::Status status = cuda::launch_weighted_sum(to, from, sum, stream.native_handle());
    TORCH_CHECK(status == 0, kTitle, "the launch on ", out.device(),
                " failed: ", cuda::status_text(status));
    return;
  }
#endif
  const cpu::SumKernel kernel = cpu::sum_kernel(to, from);
  const int64_t chunk = cpu::chunk_cost(sum.n * sum.num_inputs) / sum.num_inputs;
  parallel_chunks(Threads::kAll, sum.n, std::max<int64_t>(chunk / 64 * 64, 2048),
                  [&](int64_t begin, int64_t end) { kernel(sum, begin, end); });
}

void weighted_sum_(const at::Tensor& out, at::TensorList inputs, at::ArrayRef<double> weights) {
  check(out, inputs, weights);
  if (inputs.empty() || out.numel() == 0) return;
  const std::string backend = service_of(out.device()).backend;
  if (backend == "foreach") {
    const at::Tensor sum = out.to(at::kDouble);
    for (size_t k = 0; k < inputs.size(); ++k) sum.add_(inputs[k], weights[k]);
    out.copy_(sum);
    return;
  }
  WeightedSum sum;
  sum.out = out.mutable_data_ptr();
  sum.n = out.numel();
  for (size_t first = 0; first < inputs.size(); first += kMaxInputs) {
    sum.num_inputs = static_cast<int32_t>(std::min<size_t>(kMaxInputs, inputs.size() - first));
    for (int k = 0; k < sum.num_inputs; ++k) {
      sum.inputs[k] = inputs[first + k].const_data_ptr();
      sum.weights[k] = weights[first + k];
    }
    run(out, sum, *dtype_of(out.scalar_type()), *dtype_of(inputs[0].scalar_type()));
  }
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_ema, m) {
  m.def("weighted_sum_(Tensor(a!) out, Tensor[] inputs, float[] weights) -> ()");
}

TORCH_LIBRARY_IMPL(fused_ema, CompositeExplicitAutograd, m) {
  m.impl("weighted_sum_", &weighted_sum_);
}

}  // namespace fused_ema
