#include "ops.h"

namespace fused_ema {

void run_once(const Signature& signature, const Tensors& a, const Tensors& b,
              const Operation& operation, int num_averages) {
  Groups groups =
      make_groups(signature, a, b, check_lists(signature, a, b, {}, num_averages), num_averages);
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

Operation update_operation(const char* op, std::vector<double> momenta, int num_averages,
                           const std::string& form) {
  TORCH_CHECK_VALUE(static_cast<int>(momenta.size()) == num_averages, "fused_ema.", op, ": ",
                    momenta.size(), " momenta for ", num_averages,
                    " averages; pass one for each of them");
  for (double momentum : momenta) check_momentum(op, momentum);
  if (num_averages == 1) return update_operation(op, momenta[0], form);
  Operation operation{Operation::Kind::kUpdate, parse_form(op, form)};
  operation.momenta = std::move(momenta);
  return operation;
}

Operation update_operation(const char* op, const at::Tensor& momenta, int num_averages,
                           const std::string& form) {
  TORCH_CHECK_TYPE(momenta.dim() == 1 && momenta.size(0) == num_averages &&
                       momenta.scalar_type() == at::kDouble && momenta.is_contiguous(),
                   "fused_ema.", op, ": the momenta are a tensor of ", momenta.scalar_type(),
                   " and shape ", momenta.sizes(), " for ", num_averages,
                   " averages; pass as many floats, or a contiguous 1-dim torch.float64 tensor of "
                   "as many elements");
  if (momenta.is_cpu()) {
    const double* values = momenta.const_data_ptr<double>();
    return update_operation(op, std::vector<double>(values, values + num_averages), num_averages,
                            form);
  }
  if (num_averages == 1) return update_operation(op, momenta.select(0, 0), form);
  return Operation{Operation::Kind::kUpdate, parse_form(op, form), 0.0, momenta};
}

void update_(const Tensors& ema, const Tensors& params, double momentum, const std::string& form) {
  run_once(kUpdateSignature, ema, params, update_operation("update_", momentum, form));
}

void update_(const Tensors& ema, const Tensors& params, const at::Tensor& momentum,
             const std::string& form) {
  run_once(kUpdateSignature, ema, params, update_operation("update_", momentum, form));
}

void update_averages_(const Tensors& ema, const Tensors& params, std::vector<double> momenta,
                      const std::string& form) {
  const auto num_averages = static_cast<int>(momenta.size());
  run_once(kUpdateSignature, ema, params,
           update_operation("update_", std::move(momenta), num_averages, form), num_averages);
}

void update_averages_(const Tensors& ema, const Tensors& params, const at::Tensor& momenta,
                      const std::string& form) {
  const auto num_averages = static_cast<int>(momenta.numel());
  run_once(kUpdateSignature, ema, params, update_operation("update_", momenta, num_averages, form),
           num_averages);
}

void swap_(const Tensors& a, const Tensors& b) {
  run_once(kSwapSignature, a, b, Operation{Operation::Kind::kSwap});
}

void copy_(const Tensors& dst, const Tensors& src) {
  run_once(kCopySignature, dst, src, Operation{Operation::Kind::kCopyToA});
}

}  // namespace fused_ema
