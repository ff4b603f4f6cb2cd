// All validation. Runs before anything is written; kernels check nothing.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "dtype_pairs.h"
#include "ema_math.h"

namespace fused_ema {

using Tensors = std::vector<at::Tensor>;

// What an operation calls its lists, which of them it writes, and whether the narrower dtype may
// stand first (swap_ and copy_).
struct Signature {
  const char* op;
  const char* side_a;
  const char* side_b;
  bool writes_a;
  bool writes_b;
  bool either_order;
};

constexpr Signature kUpdateSignature{"update_", "ema", "params", true, false, false};
constexpr Signature kSwapSignature{"swap_", "a", "b", true, true, true};
constexpr Signature kCopySignature{"copy_", "dst", "src", true, false, true};
constexpr Signature kPlanSignature{"Plan", "ema", "params", true, true, false};

// As Python spells them after "torch.".
const char* dtype_name(at::ScalarType type);
const char* dtype_name(Dtype dtype);

// The dtype pair with a kernel, and whether the lists stand the other way round in it.
struct FoundPair {
  DtypePair pair;
  bool flipped;
};
std::optional<FoundPair> find_pair(at::ScalarType a, at::ScalarType b, bool either_order);

// Raises TypeError (dtypes, layouts), ValueError (lengths, shapes, devices, overlap) or
// RuntimeError (inference tensors) at the first pair that the operation can't serve. names may be
// empty.
void check_lists(const Signature& signature, const Tensors& a, const Tensors& b,
                 const std::vector<std::string>& names);

// Raises ValueError outside of [0, 1].
void check_momentum(const char* op, double momentum);
Form parse_form(const char* op, const std::string& form);

// Whether a kernel may work on the memory of this pair: plain tensors, both dense, equal strides,
// addresses aligned to the element. Otherwise torch's own functions serve the pair.
bool has_plain_memory(const at::Tensor& a, const at::Tensor& b);

}  // namespace fused_ema
