#include "fallback.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/scalar_tensor.h>

namespace fused_ema::fallback {
namespace {

void update_by_tensor(const at::Tensor& ema, const at::Tensor& param, const at::Tensor& momentum,
                      Form form) {
  // No foreach function takes a weight from device memory without a synchronisation.
  if (form == Form::kLerp) {
    ema.lerp_(param.to(ema.scalar_type()), momentum.to(ema.scalar_type()));
  } else {
    ema.mul_(1.0 - momentum).add_(param.mul(momentum));
  }
}

}  // namespace

void update(const Tensors& ema, const Tensors& params, double momentum,
            const std::optional<at::Tensor>& device_momentum, Form form) {
  const at::NoGradGuard no_grad;
  Tensors foreach_ema;
  Tensors foreach_params;
  for (size_t i = 0; i < ema.size(); ++i) {
    const at::Tensor& e = ema[i];
    const at::Tensor& p = params[i];
    if (device_momentum) {
      update_by_tensor(e, p, *device_momentum, form);
    } else if (form == Form::kLerp && e.scalar_type() != p.scalar_type()) {
      e.lerp_(p.to(e.scalar_type()), momentum);
    } else if (form == Form::kMulAdd && e.is_cpu()) {
      // On the CPU a C++ or foreach scalar is rounded to a bf16 or fp16 ema's dtype. The number
      // that Python's mul_ takes isn't: it is a 0-dim double, marked as one that promotes nothing.
      const at::Tensor decay = at::scalar_tensor(1.0 - momentum, at::kDouble);
      decay.unsafeGetTensorImpl()->set_wrapped_number(true);
      e.mul_(decay).add_(p, momentum);
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

void swap(const Tensors& a, const Tensors& b) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < a.size(); ++i) {
    const at::Tensor kept = a[i].clone();
    a[i].copy_(b[i]);
    b[i].copy_(kept);
  }
}

void copy(const Tensors& dst, const Tensors& src) {
  const at::NoGradGuard no_grad;
  if (!dst.empty()) at::_foreach_copy_(dst, src);
}

}  // namespace fused_ema::fallback
