#include "fallback.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>

namespace fused_ema::fallback {
namespace {

void update_by_tensor(const at::Tensor& ema, const at::Tensor& param, const at::Tensor& momentum,
                      Form form) {
  // No foreach function takes a weight from device memory without a synchronisation.
  const at::Tensor values = param.to(ema.scalar_type());
  const at::Tensor averaged = form == Form::kLerp
                                  ? ema.lerp(values, momentum.to(ema.scalar_type()))
                                  : ema.mul(1.0 - momentum).add_(param.mul(momentum));
  // 0 is no update and 1 a copy, to the last bit: 0 * inf is NaN.
  ema.copy_(at::where(momentum == 0, ema, at::where(momentum == 1, values, averaged)));
}

// Torch's copies of bf16 and fp16 on CUDA go through fp32 and lose a NaN's payload; as integers
// they move as they are.
std::pair<at::Tensor, at::Tensor> as_bits(const at::Tensor& a, const at::Tensor& b) {
  const auto is_memory = [](const at::Tensor& tensor) {
    return is_plain(tensor) && tensor.layout() == at::kStrided;
  };
  if (a.scalar_type() != b.scalar_type() || a.element_size() != 2 || a.is_cpu() || !is_memory(a) ||
      !is_memory(b)) {
    return {a, b};
  }
  return {a.view(at::kShort), b.view(at::kShort)};
}

// Views that are negated when they are read (imag of a conjugate): torch's lists refuse to write
// them.
bool is_lazy_view(const at::Tensor& a, const at::Tensor& b) {
  return a.is_neg() || b.is_neg() || a.is_conj() || b.is_conj();
}

at::Tensor as_number(double value) {
  at::Tensor number = at::scalar_tensor(value, at::kDouble);
  number.unsafeGetTensorImpl()->set_wrapped_number(true);
  return number;
}

}  // namespace

Temporaries::Device Temporaries::device_of(const at::Tensor& tensor) {
  return {tensor.device().type(), tensor.device().index()};
}

void Temporaries::reserve(Sizes& bytes, const at::Tensor& tensor, at::ScalarType dtype) {
  if (!is_plain(tensor)) return;
  int64_t& most = bytes[device_of(tensor)];
  most = std::max(most, tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype)));
}

Temporaries::Temporaries(const Sizes& bytes) {
  for (const auto& [device, most] : bytes) {
    const at::Device where(device.first, device.second);
    rooms_[device] = at::empty({most}, at::TensorOptions().dtype(at::kByte).device(where));
  }
}

Temporaries Temporaries::for_update(const Tensors& ema, const Tensors& params,
                                    const std::vector<double>& momenta, Form form) {
  Sizes bytes;
  for (size_t i = 0; i < ema.size(); ++i) {
    const at::ScalarType dtype = ema[i].scalar_type();
    if (form == Form::kTwoProducts) {
      reserve(bytes, params[i], params[i].scalar_type());
    } else if (params[i].scalar_type() != dtype) {
      reserve(bytes, params[i], dtype);
    }
  }
  Temporaries temporaries(bytes);
  for (double momentum : momenta) {
    Weights& weights = temporaries.weights.emplace_back(Weights{momentum, {}, {}});
    if (form == Form::kLerp) continue;
    weights.decay_tensor = as_number(1.0 - momentum);
    weights.momentum_tensor = as_number(momentum);
  }
  return temporaries;
}

Temporaries Temporaries::for_swap(const Tensors& a) {
  Sizes bytes;
  for (const at::Tensor& tensor : a) reserve(bytes, tensor, tensor.scalar_type());
  return Temporaries(bytes);
}

at::Tensor Temporaries::copy_of(const at::Tensor& tensor, at::ScalarType dtype) {
  if (!is_plain(tensor)) return tensor.to(dtype, /*non_blocking=*/false, /*copy=*/true);
  const at::Tensor& room = rooms_.at(device_of(tensor));
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype));
  const at::Tensor copy = room.narrow(0, 0, bytes).view(dtype).view(tensor.sizes());
  return copy.copy_(tensor);
}

void update(const Tensors& ema, const Tensors& params, int average,
            const std::optional<at::Tensor>& device_momentum, Form form, Temporaries& temporaries) {
  const at::NoGradGuard no_grad;
  const auto& [momentum, decay_tensor, momentum_tensor] = temporaries.weights[average];
  Tensors foreach_ema;
  Tensors foreach_params;
  for (size_t i = 0; i < ema.size(); ++i) {
    const at::Tensor& e = ema[i];
    const at::Tensor& p = params[i];
    const auto same_dtype = [&] {
      return e.scalar_type() == p.scalar_type() ? p : temporaries.copy_of(p, e.scalar_type());
    };
    if (device_momentum) {
      update_by_tensor(e, p, *device_momentum, form);
    } else if (form == Form::kLerp && (e.scalar_type() != p.scalar_type() || is_lazy_view(e, p))) {
      e.lerp_(same_dtype(), momentum);
    } else if (form == Form::kTwoProducts) {
      const at::Tensor added = temporaries.copy_of(p, p.scalar_type()).mul_(momentum_tensor);
      e.mul_(decay_tensor).add_(added);
    } else if (form == Form::kMulAdd && (e.is_cpu() || is_lazy_view(e, p))) {
      e.mul_(decay_tensor).add_(same_dtype(), momentum);
    } else {
      foreach_ema.push_back(e);
      foreach_params.push_back(p);
    }
  }
  if (foreach_ema.empty()) return;
  if (form == Form::kLerp) {
    at::_foreach_lerp_(foreach_ema, foreach_params, momentum);
  } else {
    at::_foreach_mul_(foreach_ema, 1.0 - momentum);
    at::_foreach_add_(foreach_ema, foreach_params, momentum);
  }
}

void swap(const Tensors& a, const Tensors& b, Temporaries& temporaries) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < a.size(); ++i) {
    const auto [first, second] = as_bits(a[i], b[i]);
    const at::Tensor kept = temporaries.copy_of(first, first.scalar_type());
    first.copy_(second);
    second.copy_(kept);
  }
}

void copy(const Tensors& dst, const Tensors& src) {
  const at::NoGradGuard no_grad;
  if (dst.empty()) return;
  Tensors to;
  Tensors from;
  for (size_t i = 0; i < dst.size(); ++i) {
    if (is_lazy_view(dst[i], src[i])) {
      dst[i].copy_(src[i]);
      continue;
    }
    auto [first, second] = as_bits(dst[i], src[i]);
    to.push_back(std::move(first));
    from.push_back(std::move(second));
  }
  if (!to.empty()) at::_foreach_copy_(to, from);
}

}  // namespace fused_ema::fallback
