// The one-shot operations: check, group, run.
#pragma once

#include "checks.h"
#include "groups.h"

namespace fused_ema {

void update_(const Tensors& ema, const Tensors& params, double momentum, const std::string& form);
// momentum: a 0-dim float64 tensor, read by the kernel where it lies on the lists' device.
void update_(const Tensors& ema, const Tensors& params, const at::Tensor& momentum,
             const std::string& form);
// ema: the lists of as many averages as there are momenta, one after the other.
void update_averages_(const Tensors& ema, const Tensors& params, std::vector<double> momenta,
                      const std::string& form);
void update_averages_(const Tensors& ema, const Tensors& params, const at::Tensor& momenta,
                      const std::string& form);
void swap_(const Tensors& a, const Tensors& b);
void copy_(const Tensors& dst, const Tensors& src);

// a: of several averages one list after the other.
void run_once(const Signature& signature, const Tensors& a, const Tensors& b,
              const Operation& operation, int num_averages = 1);

// The update that momentum, as a number or a tensor, and form ask for; raises on bad ones.
Operation update_operation(const char* op, double momentum, const std::string& form);
Operation update_operation(const char* op, const at::Tensor& momentum, const std::string& form);
// Of several averages: a momentum for each, or a 1-dim tensor of as many.
Operation update_operation(const char* op, std::vector<double> momenta, int num_averages,
                           const std::string& form);
Operation update_operation(const char* op, const at::Tensor& momenta, int num_averages,
                           const std::string& form);

}  // namespace fused_ema
