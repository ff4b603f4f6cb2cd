#include "ops.h"

namespace fused_ema {

void run_once(const Signature& signature, const Tensors& a, const Tensors& b,
              const Operation& operation) {
  Groups groups = make_groups(signature, a, b, check_lists(signature, a, b, {}));
  check_device_momentum(signature.op, groups, operation);
  run(groups, operation);
}

Operation update_operation(const char* op, double momentum, const std::string& form) {
  check_momentum(op, momentum);
  return Operation{Operation::Kind::kUpdate, parse_form(op, form), momentum};
}

Operation update_operation(const char* op, const at::Tensor& momentum, const std::string& form) {
  TORCH_CHECK_TYPE(momentum.dim() == 0 && momentum.scalar_type() == at::kDouble, "fused_ema.", op,
                   ": momentum is a tensor of ", momentum.scalar_type(), " and shape ",
                   momentum.sizes(), "; pass a float, or a 0-dim torch.float64 tensor");
  if (momentum.is_cpu()) return update_operation(op, momentum.item<double>(), form);
  return Operation{Operation::Kind::kUpdate, parse_form(op, form), 0.0, momentum};
}

void update_(const Tensors& ema, const Tensors& params, double momentum, const std::string& form) {
  run_once(kUpdateSignature, ema, params, update_operation("update_", momentum, form));
}

void update_(const Tensors& ema, const Tensors& params, const at::Tensor& momentum,
             const std::string& form) {
  run_once(kUpdateSignature, ema, params, update_operation("update_", momentum, form));
}

void swap_(const Tensors& a, const Tensors& b) {
  run_once(kSwapSignature, a, b, Operation{Operation::Kind::kSwap});
}

void copy_(const Tensors& dst, const Tensors& src) {
  run_once(kCopySignature, dst, src, Operation{Operation::Kind::kCopyToA});
}

}  // namespace fused_ema
