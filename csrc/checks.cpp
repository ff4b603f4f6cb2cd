#include "checks.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <charconv>

#include "parallel.h"
#include "records.h"

namespace fused_ema {
namespace {

// Of a list that is as long as `size` says; of several such, one after the other, also which.
std::string where(const char* side, size_t index, size_t size, bool is_one_of_several,
                  const std::vector<std::string>& names) {
  std::string text = side;
  const auto add = [&](size_t number) {
    text.append("[").append(std::to_string(number)).append("]");
  };
  if (is_one_of_several) add(index / size);
  add(index % size);
  if (!names.empty()) text += " ('" + names[index % size] + "')";
  return text;
}

const char* layout_name(at::Layout layout) {
  switch (layout) {
    case at::kSparse:
      return "sparse_coo";
    case at::kSparseCsr:
      return "sparse_csr";
    case at::kMkldnn:
      return "_mkldnn";
    default:
      return "not strided";
  }
}

// What a dtype without kernels may be moved as.
std::optional<Dtype> dtype_of_width(size_t bytes) {
  switch (bytes) {
    case 2:
      return Dtype::kBFloat16;
    case 4:
      return Dtype::kFloat32;
    case 8:
      return Dtype::kFloat64;
    default:
      return std::nullopt;
  }
}

std::string supported_pairs(bool either_order) {
  std::string text;
  const auto add = [&](Dtype a, Dtype b) {
    if (!text.empty()) text += ", ";
    text += std::string(dtype_name(a)) + "/" + dtype_name(b);
  };
  for (const PairDtypes& pair : kPairDtypes) add(pair.a, pair.b);
  if (either_order) {
    for (const PairDtypes& pair : kPairDtypes) {
      if (pair.a != pair.b) add(pair.b, pair.a);
    }
  }
  return text;
}

// All digits that tell it from its neighbours: 1.0000001 is not "1".
std::string shortest(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof(text), value).ptr);
}

bool is_expanded(const at::Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) return true;
  }
  return false;
}

// Shorter lists take one thread: starting another takes longer than the look.
constexpr size_t kParallelPairs = 512;

// Bytes of its storage up to the end of its last element.
int64_t bytes_needed(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t extent = tensor.numel();
  if (!tensor.is_non_overlapping_and_dense()) {
    extent = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return (tensor.storage_offset() + extent) * static_cast<int64_t>(tensor.itemsize());
}

int64_t bytes_held(const at::Tensor& tensor) {
  return static_cast<int64_t>(storage_of(*tensor.unsafeGetTensorImpl())->nbytes());
}

// Whether equal elements of two dense tensors of one shape lie equally far from their beginnings.
bool have_equal_strides(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.stride(d) != b.stride(d) && a.size(d) > 1) return false;
  }
  return true;
}

// The outcome of the whole check on one pair that look() could not clear.
void check_pair(const Signature& s, const at::Tensor& a, const at::Tensor& b,
                const std::string& at_a, const std::string& at_b) {
  const auto check_layout = [&](const at::Tensor& tensor, const std::string& at) {
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "fused_ema.", s.op, ": ", at,
                     " has layout torch.", layout_name(tensor.layout()),
                     "; only dense tensors can be averaged, pass .to_dense() or leave it out");
  };
  check_layout(a, at_a);
  check_layout(b, at_b);
  TORCH_CHECK_TYPE(find_pair(s, a.scalar_type(), b.scalar_type()).has_value(), "fused_ema.", s.op,
                   ": ", at_a, " is torch.", dtype_name(a.scalar_type()), " and ", at_b,
                   " is torch.", dtype_name(b.scalar_type()),
                   "; supported pairs: ", supported_pairs(s.either_order),
                   ". Convert one of them, or leave the pair out");
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), "fused_ema.", s.op, ": ", at_a, " has shape ",
                    a.sizes(), " but ", at_b, " has shape ", b.sizes(),
                    "; pass lists whose tensors match pairwise");
  TORCH_CHECK_VALUE(a.device() == b.device(), "fused_ema.", s.op, ": ", at_a, " is on ", a.device(),
                    " but ", at_b, " is on ", b.device(),
                    "; move one of them to the other's device");
  const auto check_written = [&](const at::Tensor& tensor, const std::string& at) {
    TORCH_CHECK_VALUE(!is_expanded(tensor), "fused_ema.", s.op, ": ", at,
                      " is expanded: several of its elements share one place in memory; pass a "
                      ".contiguous() copy");
    TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), "fused_ema.", s.op,
                ": ", at,
                " is an inference tensor and can't be written outside torch.inference_mode(); "
                "pass a .clone() made outside of it");
  };
  if (s.writes_a) check_written(a, at_a);
  if (s.writes_b) check_written(b, at_b);
  const auto check_memory = [&](const at::Tensor& tensor, const std::string& at) {
    if (!is_plain(tensor) || !tensor.has_storage()) return;
    TORCH_CHECK_VALUE(bytes_needed(tensor) <= bytes_held(tensor), "fused_ema.", s.op, ": ", at,
                      " needs ", bytes_needed(tensor), " bytes of memory but its storage holds ",
                      bytes_held(tensor),
                      "; it was freed or cut, as sharding does between uses: call this while the "
                      "tensor is whole, or leave it out");
  };
  check_memory(a, at_a);
  check_memory(b, at_b);
}

// The dtype pair that was found last: lists have one or two, each in runs.
struct LastPair {
  at::ScalarType a = at::ScalarType::Undefined;
  at::ScalarType b = at::ScalarType::Undefined;
  std::optional<FoundPair> found = std::nullopt;
};

// Reads a pair. May run beside other threads, so it calls nothing that may need Python.
CheckedPair look(const Signature& s, const at::Tensor& a, const at::Tensor& b, LastPair& last) {
  CheckedPair pair;
  if (a.scalar_type() != last.a || b.scalar_type() != last.b) {
    last = {a.scalar_type(), b.scalar_type()};
    last.found = find_pair(s, last.a, last.b);
  }
  if (!last.found) return pair;
  pair.pair = last.found->pair;
  pair.flipped = last.found->flipped;
  bool are_plain = true;
  bool are_aligned = true;
  bool are_whole = true;
  bool have_storage = true;
  bool are_inference = false;
  for (int side : {0, 1}) {
    const at::Tensor& tensor = side == 0 ? a : b;
    if (!is_plain(tensor) || tensor.layout() != at::kStrided) {
      are_plain = false;
      continue;
    }
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    pair.device = tensor.device();
    pair.numel = tensor.numel();
    pair.is_dense[side] = tensor.is_non_overlapping_and_dense();
    const bool is_inference = tensor.is_inference();
    are_inference |= is_inference;
    if (!is_inference) pair.versions[side] = version_counter_of(impl);
    // Not has_storage(), which is virtual: a call for each tensor.
    const c10::StorageImpl* storage = storage_of(impl);
    if (storage == nullptr) {
      have_storage = false;
    } else if (pair.numel > 0 && !tensor.is_meta()) {
      pair.data[side] = data_of(impl, *storage, tensor.itemsize());
      pair.is_lazy[side] = is_lazy_copy(*storage);
      are_aligned &= reinterpret_cast<uintptr_t>(pair.data[side]) % tensor.itemsize() == 0;
      are_whole &= bytes_needed(tensor) <= bytes_held(tensor);
    }
  }
  if (!are_plain || a.sizes() != b.sizes() || a.device() != b.device()) return pair;
  const bool are_dense = pair.is_dense[0] && pair.is_dense[1];
  pair.has_memory = have_storage;
  pair.is_usual = are_dense && are_whole && !are_inference;
  pair.has_plain_memory = have_storage && are_aligned && are_dense && have_equal_strides(a, b);
  return pair;
}

template <Cache kTo>
void look_at(const Signature& s, const Tensors& a, const Tensors& b, int64_t begin, int64_t end,
             CheckedPairs& checked) {
  LastPair last;
  const auto size = static_cast<int64_t>(b.size());
  const auto pair_of = [&](int64_t i) { return i < size ? i : i % size; };
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTensorsAhead < end) {
      const int64_t further = i + kTensorsAhead;
      const int64_t nearer = i + kTensorsAhead / 2;
      for (const at::Tensor* tensor : {&a[further], &b[pair_of(further)]}) {
        prefetch_tensor<kTo>(tensor->unsafeGetTensorImpl());
      }
      for (const at::Tensor* tensor : {&a[nearer], &b[pair_of(nearer)]}) {
        prefetch_memory<kTo>(storage_of(*tensor->unsafeGetTensorImpl()));
      }
    }
    checked[i] = look(s, a[i], b[pair_of(i)], last);
  }
}

struct Range {
  uintptr_t begin;
  uintptr_t end;
  uint32_t index;
  bool is_b;
  bool written;
  int16_t device;
};

// By device first: the walk below remembers the last ranges of one device at a time.
bool operator<(const Range& x, const Range& y) {
  if (x.device != y.device) return x.device < y.device;
  return x.begin != y.begin ? x.begin < y.begin : x.written > y.written;
}

// The memory of one list, in order.
std::vector<Range> ranges_of(const CheckedPairs& checked, size_t size, int side, bool written) {
  std::vector<Range> ranges;
  ranges.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    const CheckedPair& pair = checked[i];
    // Whether tensors with gaps overlap can't be told from their ranges (as in torch).
    if (pair.data[side] == nullptr || !pair.is_dense[side]) continue;
    const PairDtypes dtypes = dtypes_of(pair.pair);
    const auto begin = reinterpret_cast<uintptr_t>(pair.data[side]);
    const int64_t bytes = pair.numel * size_of((side == 1) != pair.flipped ? dtypes.b : dtypes.a);
    const int device = static_cast<int>(pair.device.type()) * 256 + pair.device.index() + 1;
    ranges.push_back(Range{begin, begin + static_cast<uintptr_t>(bytes), static_cast<uint32_t>(i),
                           side == 1, written, static_cast<int16_t>(device)});
  }
  // Allocations often come in order of address.
  if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
  return ranges;
}

void check_overlap(const Signature& s, const CheckedPairs& checked, size_t size_b,
                   const std::vector<std::string>& names, Threads threads) {
  std::vector<Range> ranges[2];
  const int64_t sides_a_chunk = checked.size() > kParallelPairs ? 1 : 2;
  parallel_chunks(threads, 2, sides_a_chunk, [&](int64_t begin, int64_t end) {
    for (int64_t side = begin; side < end; ++side) {
      ranges[side] = ranges_of(checked, side == 0 ? checked.size() : size_b, static_cast<int>(side),
                               side == 0 ? s.writes_a : s.writes_b);
    }
  });
  const Range* last_read = nullptr;
  const Range* last_written = nullptr;
  const auto step = [&](const Range& range) {
    // A read may repeat a read; nothing else may start before a range ends.
    for (const Range* other : {last_written, range.written ? last_read : nullptr}) {
      if (other == nullptr || other->device != range.device || range.begin >= other->end) continue;
      const bool in_order =
          std::pair(other->is_b, other->index) < std::pair(range.is_b, range.index);
      const Range& one = in_order ? *other : range;
      const Range& two = in_order ? range : *other;
      const auto place = [&](const Range& r) {
        return where(r.is_b ? s.side_b : s.side_a, r.index, size_b,
                     !r.is_b && checked.size() > size_b, names);
      };
      TORCH_CHECK_VALUE(false, "fused_ema.", s.op, ": ", place(one), " and ", place(two),
                        " share memory; pass each tensor once, or a .clone() of one of them");
    }
    const Range*& last = range.written ? last_written : last_read;
    if (last == nullptr || last->device != range.device || range.end > last->end) last = &range;
  };
  auto a = ranges[0].begin();
  auto b = ranges[1].begin();
  while (a != ranges[0].end() || b != ranges[1].end()) {
    const bool takes_b = a == ranges[0].end() || (b != ranges[1].end() && *b < *a);
    step(takes_b ? *b++ : *a++);
  }
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kNotPlain{
      c10::DispatchKey::Python,        c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper,
      c10::DispatchKey::Negative,      c10::DispatchKey::Conjugate,
      c10::DispatchKey::ZeroTensor};
  return !tensor.key_set().has_any(kNotPlain);
}

std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

const char* dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kByte:
      return "uint8";
    case at::kChar:
      return "int8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kBool:
      return "bool";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:
      return c10::toString(type);
  }
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "";
}

std::optional<FoundPair> find_pair(const Signature& s, at::ScalarType a, at::ScalarType b) {
  std::optional<Dtype> x = dtype_of(a);
  if (!x && s.moves_bits && a == b) x = dtype_of_width(c10::elementSize(a));
  const std::optional<Dtype> y = a == b ? x : dtype_of(b);
  if (!x || !y) return std::nullopt;
  for (int i = 0; i < kNumDtypePairs; ++i) {
    const auto pair = static_cast<DtypePair>(i);
    const PairDtypes dtypes = dtypes_of(pair);
    if (dtypes.a == *x && dtypes.b == *y) return FoundPair{pair, false};
    if (s.either_order && dtypes.a == *y && dtypes.b == *x) return FoundPair{pair, true};
  }
  return std::nullopt;
}

CheckedPairs check_lists(const Signature& s, const Tensors& a, const Tensors& b,
                         const std::vector<std::string>& names, int num_averages) {
  TORCH_CHECK_VALUE(a.size() == num_averages * b.size(), "fused_ema.", s.op, ": ", s.side_a,
                    " holds ", a.size(), " tensors but ", s.side_b, " holds ", b.size(),
                    "; pass lists of the same length");
  TORCH_CHECK_VALUE(names.empty() || names.size() == b.size(), "fused_ema.", s.op, ": ",
                    names.size(), " names for ", b.size(), " pairs; pass one name a pair, or none");
  CheckedPairs checked(a.size());
  const auto size = static_cast<int64_t>(a.size());
  const bool on_cpu = !a.empty() && a[0].is_cpu();
  const Threads threads = on_cpu ? Threads::kAll : Threads::kThisOne;
  parallel_chunks(threads, size, kParallelPairs, [&](int64_t begin, int64_t end) {
    if (size <= kTensorsAChunk) {
      look_at<Cache::kFirst>(s, a, b, begin, end, checked);
    } else {
      look_at<Cache::kSecond>(s, a, b, begin, end, checked);
    }
  });
  for (int k = 0; k < num_averages; ++k) {
    const size_t first = k * b.size();
    for (size_t i = 0; i < b.size(); ++i) {
      const auto at_a = [&](size_t index) {
        return where(s.side_a, index, b.size(), num_averages > 1, names);
      };
      if (!checked[first + i].is_usual) {
        check_pair(s, a[first + i], b[i], at_a(first + i),
                   where(s.side_b, i, b.size(), false, names));
      }
      // One launch takes them all.
      TORCH_CHECK_TYPE(k == 0 || a[first + i].scalar_type() == a[i].scalar_type(), "fused_ema.",
                       s.op, ": ", at_a(i), " is torch.", dtype_name(a[i].scalar_type()), " and ",
                       at_a(first + i), " is torch.", dtype_name(a[first + i].scalar_type()),
                       "; pass averages of one dtype for a param, or make a plan for each");
    }
  }
  check_overlap(s, checked, b.size(), names, threads);
  return checked;
}

void check_momentum(const char* op, double momentum) {
  // NaN fails both comparisons.
  TORCH_CHECK_VALUE(momentum >= 0.0 && momentum <= 1.0, "fused_ema.", op, ": momentum is ",
                    shortest(momentum),
                    "; it is the weight of the new value and must be in [0, 1]");
}

Form parse_form(const char* op, const std::string& form) {
  if (form == "lerp") return Form::kLerp;
  if (form == "mul_add") return Form::kMulAdd;
  if (form == "two_products") return Form::kTwoProducts;
  TORCH_CHECK_VALUE(false, "fused_ema.", op, ": form is '", form,
                    "'; choose 'lerp', 'mul_add' or 'two_products'");
}

}  // namespace fused_ema
