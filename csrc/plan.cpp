#include "plan.h"

#include <algorithm>
#include <atomic>
#include <unordered_set>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "parallel.h"
#include "records.h"

namespace fused_ema {
namespace {

// Every plan there is: a fork copies their locks as they are, held ones held for ever.
struct Registry {
  std::mutex mutex;
  std::unordered_set<Plan*> plans;

  Registry() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     for (Plan* plan : registry().plans) plan->forget_lock();
                     registry().mutex.unlock();
                   });
#endif
  }

  static Registry& registry() {
    static auto* const it = new Registry;  // never deleted: plans may live until the very end
    return *it;
  }
};

// Number of dimensions, sizes, strides. The same memory under other strides, as p.data = p.data.t()
// makes it, pairs other elements.
bool has_geometry(const c10::TensorImpl& tensor, const int64_t* saved) {
  const c10::IntArrayRef sizes = tensor.sizes();
  const c10::IntArrayRef strides = tensor.strides();
  return static_cast<int64_t>(sizes.size()) == saved[0] &&
         std::equal(sizes.begin(), sizes.end(), saved + 1) &&
         std::equal(strides.begin(), strides.end(), saved + 1 + sizes.size());
}

std::vector<Plan::GroupFacts> facts_of(const Groups& groups) {
  using GroupFacts = Plan::GroupFacts;
  std::vector<GroupFacts> facts;
  for (const Group& group : groups.groups) {
    facts.push_back({service_of(group.device).backend, group.device.str(),
                     dtype_name(dtypes_of(group.pair).a), dtype_name(dtypes_of(group.pair).b),
                     group.num_pairs, group.spans.num_elements, groups.num_averages});
  }
  // One entry per device and dtype pair of what torch serves, in order of first appearance.
  const size_t first_fallback = facts.size();
  const Tensors& fallback_a = groups.fallback_a.get();
  const Tensors& fallback_b = groups.fallback_b.get();
  for (size_t i = 0; i < fallback_b.size(); ++i) {
    const at::Tensor& ema = fallback_a[i];
    const at::Tensor& param = fallback_b[i];
    const GroupFacts fact{"foreach",
                          ema.device().str(),
                          dtype_name(ema.scalar_type()),
                          dtype_name(param.scalar_type()),
                          1,
                          ema.numel(),
                          groups.num_averages};
    const auto same =
        std::find_if(facts.begin() + first_fallback, facts.end(), [&](const GroupFacts& other) {
          return other.device == fact.device && other.ema_dtype == fact.ema_dtype &&
                 other.param_dtype == fact.param_dtype;
        });
    if (same == facts.end()) {
      facts.push_back(fact);
    } else {
      ++same->num_tensors;
      same->num_elements += fact.num_elements;
    }
  }
  return facts;
}

}  // namespace

Plan::Plan(std::unique_ptr<TensorLists> lists, std::vector<std::string> names, bool only_moves,
           bool only_borrows)
    : signature_(only_moves ? kCopyPlanSignature : kPlanSignature),
      only_borrows_(only_borrows),
      lists_(std::move(lists)),
      names_(std::move(names)) {
  refresh();
  Registry& registry = Registry::registry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.plans.insert(this);
}

Plan::~Plan() {
  Registry& registry = Registry::registry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.plans.erase(this);
}

void Plan::refresh() {
  lists_->reread();
  const Tensors& ema = lists_->first();
  const Tensors& params = lists_->second();
  const int num_averages = lists_->num_averages();
  const CheckedPairs checked = check_lists(signature_, ema, params, names_, num_averages);
  for (const Tensors* tensors : {&ema, &params}) {
    for (const at::Tensor& tensor : *tensors) {
      // An upload recorded in a graph would read this host memory again at every replay.
      TORCH_CHECK(!tensor.is_cuda() || !is_capturing(tensor.device()),
                  "fused_ema.Plan: a plan can't be made, or made anew for tensors that moved, "
                  "while a CUDA graph is being captured; run it once before the capture");
      if (tensor.is_cuda()) break;
    }
  }
  auto state = std::make_unique<State>();
  state->groups = make_groups(signature_, ema, params, checked, num_averages);
  // A new plan waits for its upload. One that is made anew inside a call must not, and need not:
  // a stream that isn't ordered after this one would already race on the emas.
  const bool is_new = num_refreshes_ < 0;
  upload_tables(state->groups, /*wait=*/is_new);
  state->facts = facts_of(state->groups);
  const auto note = [&](const at::Tensor& tensor, bool has_memory) {
    if (!has_memory) {
      state->wrappers.push_back(tensor);
      state->wrapper_sizes.push_back(tensor.sizes().vec());
      state->wrapper_dtypes.push_back(tensor.scalar_type());
      return;
    }
    std::vector<int64_t>& geometry = state->geometry;
    state->seen.push_back(Seen{tensor.unsafeGetTensorImpl(), tensor.const_data_ptr(),
                               tensor.numel(), tensor.dtype(),
                               static_cast<uint8_t>(tensor.itemsize()), tensor.is_contiguous(),
                               static_cast<uint32_t>(geometry.size())});
    if (tensor.is_contiguous()) return;
    geometry.push_back(tensor.dim());
    geometry.insert(geometry.end(), tensor.sizes().begin(), tensor.sizes().end());
    geometry.insert(geometry.end(), tensor.strides().begin(), tensor.strides().end());
  };
  const size_t size = params.size();
  for (size_t i = 0; i < size; ++i) {
    bool has_memory = true;
    for (int k = 0; k < num_averages; ++k) has_memory &= checked[k * size + i].has_memory;
    if (only_borrows_ || !has_memory) {
      state->borrowed.push_back(i);
    } else {
      for (int k = 0; k < num_averages; ++k) state->held.push_back(ema[k * size + i]);
      state->held.push_back(params[i]);
    }
    for (int k = 0; k < num_averages; ++k) note(ema[k * size + i], has_memory);
    note(params[i], has_memory);
  }
  state_ = std::move(state);
  ++num_refreshes_;
}

bool Plan::is_unchanged(const Seen& seen) const {
  const c10::TensorImpl& tensor = *seen.tensor;
  const c10::StorageImpl* storage = storage_of(tensor);
  if (storage == nullptr || tensor.numel() != seen.numel) return false;
  if (tensor.dtype() != seen.dtype) return false;
  if (seen.numel > 0 && data_of(tensor, *storage, seen.itemsize) != seen.data) return false;
  // A lazy copy was taken meanwhile: a write would reach it. Making the plan anew parts the two.
  if (is_lazy_copy(*storage)) return false;
  // As many elements, contiguous: the same ones in the same order, whatever their shape. The flag
  // lies beside the number; sizes and strides would be one or two cache misses more.
  if (seen.is_contiguous) return tensor.is_contiguous();
  return has_geometry(tensor, state_->geometry.data() + seen.geometry);
}

template <Cache kTo>
bool Plan::are_unchanged(int64_t begin, int64_t end) const {
  const std::vector<Seen>& seen = state_->seen;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTensorsAhead < end) {
      prefetch_tensor_but_sizes<kTo>(seen[i + kTensorsAhead].tensor);
      const c10::TensorImpl* nearer = seen[i + kTensorsAhead / 2].tensor;
      prefetch_memory<kTo>(storage_of(*nearer));
      prefetch<kTo>(version_counter_of(*nearer));  // the write will bump it
    }
    if (!is_unchanged(seen[i])) return false;
  }
  return true;
}

bool Plan::is_stale() const {
  for (size_t pair : state_->borrowed) {
    if (!lists_->are_in_place(pair)) return true;
  }
  const Tensors& wrappers = state_->wrappers.get();
  for (size_t i = 0; i < wrappers.size(); ++i) {
    if (wrappers[i].sizes() != state_->wrapper_sizes[i]) return true;
    if (wrappers[i].scalar_type() != state_->wrapper_dtypes[i]) return true;
  }
  const auto size = static_cast<int64_t>(state_->seen.size());
  if (size <= kTensorsAChunk) return !are_unchanged<Cache::kFirst>(0, size);
  std::atomic<bool> stale{false};
  const Threads threads = state_->groups.has_launches() ? Threads::kThisOne : Threads::kAll;
  parallel_chunks(threads, size, kTensorsAChunk, [&](int64_t begin, int64_t end) {
    if (!are_unchanged<Cache::kSecond>(begin, end)) stale = true;
  });
  return stale;
}

void Plan::run_checked(const Operation& operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_stale()) refresh();
  check_device_momentum("Plan.update", state_->groups, operation);
  run(state_->groups, operation);
  ++num_runs_;
}

void Plan::check() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_stale()) refresh();
}

bool Plan::is_current() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !is_stale();
}

bool Plan::update_if_current(const Operation& operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_stale()) return false;
  run(state_->groups, operation);
  ++num_runs_;
  return true;
}

void Plan::update(const Operation& operation) {
  TORCH_CHECK(!signature_.moves_bits, "fused_ema.Plan: this one only moves values");
  run_checked(operation);
}

namespace {
Operation of_average(Operation::Kind kind, int average) {
  Operation operation{kind};
  operation.average = average;
  return operation;
}
}  // namespace

void Plan::swap(int average) { run_checked(of_average(Operation::Kind::kSwap, average)); }
void Plan::copy_to_ema(int average) { run_checked(of_average(Operation::Kind::kCopyToA, average)); }
void Plan::copy_to_params(int average) {
  run_checked(of_average(Operation::Kind::kCopyToB, average));
}

}  // namespace fused_ema
