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
  bool moves_bits = false;  // any dtype of 2, 4 or 8 bytes with itself, for exchanges and copies
};

constexpr Signature kUpdateSignature{"update_", "ema", "params", true, false, false};
constexpr Signature kSwapSignature{"swap_", "a", "b", true, true, true};
constexpr Signature kCopySignature{"copy_", "dst", "src", true, false, true};
constexpr Signature kPlanSignature{"Plan", "ema", "params", true, true, false};
constexpr Signature kCopyPlanSignature{"Plan", "ema", "params", true, true, false, true};

// Of those that have kernels.
std::optional<Dtype> dtype_of(at::ScalarType type);
// As Python spells them after "torch.".
const char* dtype_name(at::ScalarType type);
const char* dtype_name(Dtype dtype);

// The dtype pair with a kernel, and whether the lists stand the other way round in it.
struct FoundPair {
  DtypePair pair;
  bool flipped;
};
std::optional<FoundPair> find_pair(const Signature& s, at::ScalarType a, at::ScalarType b);

// One pair that check_lists has passed, and what it read of it. In a long list a tensor has left
// the caches by the time of a second look.
struct CheckedPair {
  const void* data[2] = {nullptr, nullptr};  // of a and of b; null: no memory to look at
  // Which counter a write bumps: views share it; null: none.
  const void* versions[2] = {nullptr, nullptr};
  int64_t numel = 0;
  at::Device device = at::kCPU;
  DtypePair pair = DtypePair::kFloat32Float32;
  bool flipped = false;              // the lists stand the other way round in the dtype pair
  bool has_memory = false;           // both have: neither is a wrapper or a lazy view
  bool has_plain_memory = false;     // a kernel may work on it; otherwise torch serves the pair
  bool is_lazy[2] = {false, false};  // copy-on-write: will be written at another address
  bool is_dense[2] = {false, false};
  bool is_usual = false;  // nothing left to check but overlap
};
using CheckedPairs = std::vector<CheckedPair>;

// Whether it has memory of its own to work on: wrappers and lazy views have none.
bool is_plain(const at::Tensor& tensor);

// Raises TypeError (dtypes, layouts), ValueError (lengths, shapes, devices, overlap, memory that
// was freed) or RuntimeError (inference tensors) at the first pair that the operation can't serve.
// names may be empty. Of several averages their lists stand in `a` one after the other, each as
// long as b, and so do the results.
CheckedPairs check_lists(const Signature& signature, const Tensors& a, const Tensors& b,
                         const std::vector<std::string>& names, int num_averages = 1);

// Raises ValueError outside of [0, 1].
void check_momentum(const char* op, double momentum);
Form parse_form(const char* op, const std::string& form);

}  // namespace fused_ema
