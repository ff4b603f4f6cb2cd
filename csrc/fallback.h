// The operations with torch's own functions, for devices and pairs without a kernel. The same as
// fused_ema/_foreach.py, which serves where nothing could be compiled.
#pragma once

#include <map>

#include "checks.h"

namespace fused_ema::fallback {

// Memory for one tensor at a time, made before a call's first write: where there is none, nothing
// is left half done. Wrappers, which have no memory of their own, get theirs when they need it.
class Temporaries {
 public:
  static Temporaries for_update(const Tensors& ema, const Tensors& params,
                                const std::vector<double>& momenta, Form form);
  static Temporaries for_swap(const Tensors& a);

  // A copy in that dtype, good until the next one is asked for.
  at::Tensor copy_of(const at::Tensor& tensor, at::ScalarType dtype);

  // Of each average. The tensors are for products: on the CPU a C++ or foreach scalar is rounded to
  // a bf16 or fp16 tensor's dtype. The number that Python's mul_ takes isn't: it is a 0-dim double
  // that promotes nothing.
  struct Weights {
    double momentum;
    at::Tensor decay_tensor;  // 1 - momentum
    at::Tensor momentum_tensor;
  };
  std::vector<Weights> weights;

 private:
  using Device = std::pair<at::DeviceType, at::DeviceIndex>;
  using Sizes = std::map<Device, int64_t>;
  static Device device_of(const at::Tensor& tensor);
  static void reserve(Sizes& bytes, const at::Tensor& tensor, at::ScalarType dtype);
  explicit Temporaries(const Sizes& bytes);

  std::map<Device, at::Tensor> rooms_;
};

// By the weights of that average, or a 0-dim float64 tensor on the device where one is given.
void update(const Tensors& ema, const Tensors& params, int average,
            const std::optional<at::Tensor>& device_momentum, Form form, Temporaries& temporaries);
void swap(const Tensors& a, const Tensors& b, Temporaries& temporaries);
void copy(const Tensors& dst, const Tensors& src);

}  // namespace fused_ema::fallback
