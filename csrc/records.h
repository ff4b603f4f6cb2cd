// What torch keeps about a tensor besides its elements, and how to reach it quickly: a TensorImpl,
// a StorageImpl and a version counter, each an allocation of its own. For 10,000 x 64 they are most
// of the memory that a call touches.
#pragma once

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/COWDeleter.h>

#include <cstring>

namespace fused_ema {

// Which counter a write to the tensor bumps: views share that of their base.
inline const void* version_counter_of(const c10::TensorImpl& tensor) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*), "VariableVersion is one pointer");
  const void* counter;
  std::memcpy(&counter, &tensor.version_counter(), sizeof(counter));
  return counter;
}

inline const c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().unsafeGetStorageImpl();
}

// Without the questions that data_ptr() asks before an access: they lie in the next line.
inline const at::DataPtr& memory_of(const c10::StorageImpl& storage) {
  return const_cast<c10::StorageImpl&>(storage)._mutable_data_ptr_no_checks();
}

// Where the elements begin, as const_data_ptr() has it.
inline const void* data_of(const c10::TensorImpl& tensor, const c10::StorageImpl& storage,
                           int64_t itemsize) {
  return static_cast<const char*>(memory_of(storage).get()) + tensor.storage_offset() * itemsize;
}

// Whether the memory is shared with a lazy copy (torch._lazy_clone) until one of them is written.
inline bool is_lazy_copy(const c10::StorageImpl& storage) {
  return memory_of(storage).get_deleter() == c10::impl::cow::cow_deleter;
}

// Where a walk fetches to. A long one's tensors come from memory, and a core has more room for
// misses on their way to its second-level cache (two thirds of the time for a walk over 20,000 cold
// tensors on a Zen 4). A short one's are often in that cache still, and the way from there counts
// (an update of 500 takes 9.7 us of a Xeon instead of 10.9).
enum class Cache { kFirst, kSecond };

template <Cache kTo = Cache::kSecond>
void prefetch(const void* address) {
  __builtin_prefetch(address, 0, kTo == Cache::kFirst ? 3 : 2);
}

// Every line of a tensor. It lies at a multiple of 16 bytes, so a field may lie in the line after
// the one that its offset suggests.
template <Cache kTo>
void prefetch_tensor(const c10::TensorImpl* tensor) {
  const char* bytes = reinterpret_cast<const char*>(tensor);
  for (int offset : {8, 64, 128, 172}) prefetch<kTo>(bytes + offset);
}
// The same without the line or two that hold nothing but sizes and strides.
template <Cache kTo>
void prefetch_tensor_but_sizes(const c10::TensorImpl* tensor) {
  const char* bytes = reinterpret_cast<const char*>(tensor);
  for (int offset : {16, 40, 144, 172}) prefetch<kTo>(bytes + offset);
}
// Of the storage, which some tensors have none of, the part that is_unchanged() and look() read.
template <Cache kTo = Cache::kSecond>
void prefetch_memory(const c10::StorageImpl* storage) {
  if (storage != nullptr) prefetch<kTo>(&memory_of(*storage));
}

// How many tensors ahead a walk fetches. The storage and the counter are found through the tensor,
// so they are fetched at half the distance.
constexpr int64_t kTensorsAhead = 32;

// What a thread takes of a walk at once. Shorter walks take one thread: another takes longer to
// start (about 5 us) than the work. They are the short ones of which Cache tells.
constexpr int64_t kTensorsAChunk = 1024;

}  // namespace fused_ema
