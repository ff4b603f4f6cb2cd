#include "groups.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "fallback.h"
#include "parallel.h"
#include "records.h"
#ifdef FUSED_EMA_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fused_ema {
namespace {

// Streams through torch's device-generic interface, so that a torch built for CPU can host this.
[[maybe_unused]] c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

Group& group_for(std::vector<Group>& groups, const CheckedPair& of) {
  // Models keep one or two dtype pairs: the last group is nearly always the right one.
  for (auto group = groups.rbegin(); group != groups.rend(); ++group) {
    if (group->pair == of.pair && group->flipped == of.flipped && group->device == of.device) {
      return *group;
    }
  }
  Group& group = groups.emplace_back();
  group.device = of.device;
  group.pair = of.pair;
  group.flipped = of.flipped;
  return group;
}

using Versions = std::vector<c10::TensorImpl*>;

// A bump is a locked instruction, which waits for its own cache miss alone.
template <Cache kTo>
void bump_versions(const Versions& tensors, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    if (i + kTensorsAhead < end) {
      prefetch<kTo>(&tensors[i + kTensorsAhead]->version_counter());
      prefetch<kTo>(version_counter_of(*tensors[i + kTensorsAhead / 2]));
    }
    tensors[i]->bump_version();
  }
}

// The share of a group's version counters that belongs to the part [begin, end) of its work.
void bump_written(const Group& group, const Operation& operation, int64_t begin, int64_t end,
                  int64_t total) {
  using Kind = Operation::Kind;
  const auto bump = [&](const Versions& tensors) {
    const auto size = static_cast<__int128>(tensors.size());  // times the cost: over 64 bits
    const auto first = static_cast<size_t>(size * begin / total);
    const auto last = static_cast<size_t>(size * end / total);
    if (size <= kTensorsAChunk) {
      bump_versions<Cache::kFirst>(tensors, first, last);
    } else {
      bump_versions<Cache::kSecond>(tensors, first, last);
    }
  };
  const bool writes_first = operation.kind != Kind::kCopyToB;
  const bool writes_second = operation.kind == Kind::kSwap || operation.kind == Kind::kCopyToB;
  if (operation.kind != Kind::kUpdate) {
    if (writes_first) bump(group.versions_a[operation.average]);
  } else {
    for (const Versions& versions : group.versions_a) bump(versions);
  }
  if (writes_second) bump(group.versions_b);
}

// Elements in a step of torch's vectorised CPU add over 2-byte dtypes: two AVX2 vectors, under
// AVX-512 too (measured, torch 2.13). Without AVX2 it takes all elements one at a time.
int64_t torch_step() {
#if defined(__x86_64__)
  static const bool has_vectors = at::get_cpu_capability() != "DEFAULT";
  return has_vectors ? 32 : INT64_MAX;
#else
  return 16;  // two NEON vectors, from reading: not measured
#endif
}

cpu::Work work_of(const Group& group, const Operation& operation) {
  using Kind = Operation::Kind;
  switch (operation.kind) {
    case Kind::kUpdate: {
      const bool is_one = group.num_averages() == 1;
      cpu::Work work{cpu::update_kernel(group.pair, operation.form),
                     is_one ? &operation.momentum : operation.momenta.data(), 0,
                     group.num_averages()};
      if (operation.form == Form::kMulAdd) {
        work.one_at_a_time = cpu::one_at_a_time_kernel(group.pair);
        const bool nested = at::in_parallel_region();
        work.torch_loop = {nested ? 1 : at::get_num_threads(), torch_step()};
      }
      return work;
    }
    case Kind::kSwap:
      return {cpu::swap_kernel(group.pair), nullptr, operation.average, operation.average + 1};
    default: {
      const bool to_a = (operation.kind == Kind::kCopyToA) != group.flipped;
      const PairDtypes dtypes = dtypes_of(group.pair);
      const int64_t bytes = group.spans.num_elements * size_of(to_a ? dtypes.a : dtypes.b);
      return {cpu::copy_kernel(group.pair, to_a, bytes >= cpu::kStreamingBytes), nullptr,
              operation.average, operation.average + 1};
    }
  }
}

void run_on_cpu(const Group& group, const Operation& operation) {
  const cpu::Work work = work_of(group, operation);
  const TileShape shape = tile_shape(group.pair);
  const int64_t total = group.spans.cost_before.back();
  // One parallel region: where another program holds a core, each region may wait for a time slice.
  const auto run = [&](int64_t begin, int64_t end) {
    // Before the work, which drives what the check has just read out of the caches.
    bump_written(group, operation, begin, end, total);
    cpu::run_range(group.spans, shape, work, begin, end);
  };
  parallel_chunks(Threads::kAll, total, cpu::chunk_cost(total), run,
                  reinterpret_cast<uintptr_t>(work.kernel));
}

#ifdef FUSED_EMA_WITH_CUDA

// Tables that graphs have replayed from. Freeing device memory may call CUDA, which the thread that
// tells of a graph's end must not; so the next plan that is made frees them.
struct FormerTables {
  std::mutex mutex;
  Tensors tables;

  static FormerTables& all() {
    static auto* const it = new FormerTables;  // never deleted: graphs may live until the very end
    return *it;
  }
  void free() {
    Tensors freed;
    const std::lock_guard<std::mutex> lock(mutex);
    freed.swap(tables);
  }
};

// A graph goes on reading the table that it was captured with, whatever becomes of the plan.
void keep_table_with_graph(const at::Tensor& table, cuda::Stream stream) {
  const cuda::Status status = cuda::keep_with_graph(stream, new at::Tensor(table), [](void* kept) {
    auto* const tensor = static_cast<at::Tensor*>(kept);
    FormerTables& former = FormerTables::all();
    const std::lock_guard<std::mutex> lock(former.mutex);
    former.tables.push_back(std::move(*tensor));
    delete tensor;
  });
  TORCH_CHECK(status == 0, "fused_ema: a plan's table can't be kept for the CUDA graph: ",
              cuda::status_text(status));
}

template <int S>
cuda::WorkOf<S> work_on(const Group& group, const Group::TableAt& table) {
  cuda::WorkOf<S> work;
  work.tiles = reinterpret_cast<const TileOf<S>*>(
      static_cast<const char*>(group.tables.const_data_ptr()) + table.begin);
  work.num_block_tiles = static_cast<uint32_t>(table.num_block_tiles);
  work.num_warp_tiles = static_cast<uint32_t>(table.num_warp_tiles);
  return work;
}
template <int S>
cuda::WorkOf<S> work_on(const std::vector<SpanOf<S>>& spans) {
  cuda::WorkOf<S> work;
  work.spans = spans.data();
  work.num_spans = static_cast<int64_t>(spans.size());
  return work;
}

// The spans of one average, or of all that one launch takes from `first` on.
std::vector<Span> pairs_of(const Group& group, int average) {
  std::vector<Span> spans;
  spans.reserve(group.spans.spans.size());
  for (size_t i = 0; i < group.spans.spans.size(); ++i)
    spans.push_back(group.spans.pair(i, average));
  return spans;
}
std::vector<SpanOf<kAveragesSides>> averages_of(const Group& group, int first, int count) {
  std::vector<SpanOf<kAveragesSides>> spans(group.spans.spans.size());
  for (size_t i = 0; i < spans.size(); ++i) {
    for (int k = 0; k < kMostAverages; ++k) {
      spans[i].sides[k] = group.spans.pair(i, k < count ? first + k : first).sides[0];
    }
    spans[i].sides[kMostAverages] = group.spans.spans[i].sides[1];
    spans[i].n = group.spans.spans[i].n;
  }
  return spans;
}

// How many of the averages from `first` on one launch takes.
int averages_from(const Group& group, int first) {
  return std::min(group.num_averages() - first, kMostAverages);
}

cuda::Status update_pairs(const Group& group, const Operation& operation, const cuda::Work& work,
                          int average, cuda::Stream stream) {
  cuda::Momentum momentum{operation.momenta.empty() ? operation.momentum
                                                    : operation.momenta[average]};
  if (operation.device_momentum) {
    momentum.device = operation.device_momentum->const_data_ptr<double>() + average;
  }
  return cuda::launch_update(group.pair, operation.form, work, momentum, stream);
}

cuda::Status update_averages(const Group& group, const Operation& operation,
                             const cuda::AveragesWork& work, int first, cuda::Stream stream) {
  cuda::Momenta momenta{averages_from(group, first), nullptr};
  if (operation.device_momentum) {
    momenta.device = operation.device_momentum->const_data_ptr<double>() + first;
  } else {
    momenta.values = operation.momenta.data() + first;
  }
  return cuda::launch_update_averages(group.pair, operation.form, work, momenta, stream);
}

// Of one average: an update, or what moves it.
cuda::Status launch_pairs(const Group& group, const Operation& operation, const cuda::Work& work,
                          int average, cuda::Stream stream) {
  using Kind = Operation::Kind;
  switch (operation.kind) {
    case Kind::kUpdate:
      return update_pairs(group, operation, work, average, stream);
    case Kind::kSwap:
      return cuda::launch_swap(group.pair, work, stream);
    default:
      return cuda::launch_copy(group.pair, (operation.kind == Kind::kCopyToA) != group.flipped,
                               work, stream);
  }
}

cuda::Status launch_averages(const Group& group, const Operation& operation, cuda::Stream stream) {
  const bool has_tables = group.tables.defined();
  size_t table = 0;
  for (int first = 0; first < group.num_averages(); first += kMostAverages) {
    const int count = averages_from(group, first);
    cuda::Status status;
    if (count == 1) {  // What is left over.
      const auto spans = has_tables ? std::vector<Span>{} : pairs_of(group, first);
      status = update_pairs(
          group, operation,
          has_tables ? work_on<2>(group, group.pair_tables[first]) : work_on(spans), first, stream);
    } else {
      using Spans = std::vector<SpanOf<kAveragesSides>>;
      const auto spans = has_tables ? Spans{} : averages_of(group, first, count);
      status = update_averages(group, operation,
                               has_tables
                                   ? work_on<kAveragesSides>(group, group.averages_tables[table++])
                                   : work_on(spans),
                               first, stream);
    }
    if (status != 0) return status;
  }
  return 0;
}

void run_on_cuda(Group& group, const Operation& operation) {
  const c10::DeviceGuard guard(group.device);
  const c10::Stream on = current_stream(group.device);
  const cuda::Stream stream = on.native_handle();
  if (group.tables.defined()) {
    // The allocator must not hand the tables to another tensor while this stream reads them.
    if (on != *group.table_stream) group.tables.record_stream(on);
    if (cuda::is_capturing(stream)) keep_table_with_graph(group.tables, stream);
  }
  cuda::Status status = 0;
  if (operation.kind == Operation::Kind::kUpdate && group.num_averages() > 1) {
    status = launch_averages(group, operation, stream);
  } else if (group.tables.defined()) {
    const int average = operation.average;
    status = launch_pairs(group, operation, work_on<2>(group, group.pair_tables[average]), average,
                          stream);
  } else {
    status = launch_pairs(group, operation, work_on(group.spans.spans), 0, stream);
  }
  TORCH_CHECK(status == 0, "fused_ema: the launch on ", group.device,
              " failed: ", cuda::status_text(status));
}
#endif

}  // namespace

Service service_of(at::Device device) {
  if (device.is_cpu()) return {"cpu", ""};
  if (!device.is_cuda()) return {"foreach", "no kernels for this kind of device"};
#ifdef FUSED_EMA_WITH_CUDA
  if (cuda::serves_device(device.has_index() ? device.index() : 0)) return {"cuda", ""};
  return {"foreach", "the kernels need compute capability 8.0 or later"};
#else
  return {"foreach", "built without nvcc"};
#endif
}

bool is_capturing([[maybe_unused]] at::Device device) {
#ifdef FUSED_EMA_WITH_CUDA
  return device.is_cuda() && cuda::is_capturing(current_stream(device).native_handle());
#else
  return false;
#endif
}

bool runs_parallel() {
  std::atomic<int> num_ranges{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++num_ranges; });
  return num_ranges == at::get_num_threads();
}

Groups make_groups(const Signature& s, const Tensors& a, const Tensors& b,
                   const CheckedPairs& checked, int num_averages) {
  Groups result;
  result.num_averages = num_averages;
  const size_t size = b.size();
  struct Lists {
    std::vector<Span> spans;
    std::vector<void*> others;
  };
  std::vector<Lists> lists;
  std::vector<size_t> left_to_torch;
  std::optional<at::Device> last_device;
  bool last_served = false;
  std::vector<const void*> last_version(num_averages + 1, nullptr);
  for (size_t i = 0; i < size; ++i) {
    const CheckedPair& pair = checked[i];
    if (pair.device != last_device) {
      last_device = pair.device;
      last_served = std::strcmp(service_of(pair.device).backend, "foreach") != 0;
    }
    bool is_plain = pair.has_plain_memory;
    for (int k = 1; k < num_averages; ++k) is_plain &= checked[k * size + i].has_plain_memory;
    if (!last_served || !is_plain) {
      left_to_torch.push_back(i);
      continue;
    }
    Group& group = group_for(result.groups, pair);
    ++group.num_pairs;
    if (lists.size() < result.groups.size()) {
      // Most often one group takes all.
      lists.emplace_back().spans.reserve(size - i);
      lists.back().others.reserve((size - i) * (num_averages - 1));
      group.versions_a.resize(num_averages);
      if (s.writes_a) {
        for (Versions& versions : group.versions_a) versions.reserve(size - i);
      }
      if (s.writes_b) group.versions_b.reserve(size - i);
    }
    if (pair.numel == 0) continue;
    const auto address = [&](const CheckedPair& of, int side, const at::Tensor& tensor) {
      const bool written = side == 0 ? s.writes_a : s.writes_b;
      // The mutable pointer of a lazily copied tensor is its own memory.
      return written && of.is_lazy[side] ? tensor.mutable_data_ptr()
                                         : const_cast<void*>(of.data[side]);
    };
    // Views of one flat tensor, which is how emas are best kept, stand side by side.
    const auto add_version = [&](const void* version, const void*& last, const at::Tensor& tensor,
                                 Versions& versions) {
      if (version != nullptr && version != last) versions.push_back(tensor.unsafeGetTensorImpl());
      last = version;
    };
    Lists& into = lists[&group - result.groups.data()];
    Span span{{address(pair, 0, a[i]), address(pair, 1, b[i])}, pair.numel};
    for (int k = 0; k < num_averages; ++k) {
      const CheckedPair& of = checked[k * size + i];
      const at::Tensor& ema = a[k * size + i];
      if (k > 0) into.others.push_back(address(of, 0, ema));
      if (s.writes_a) add_version(of.versions[0], last_version[k], ema, group.versions_a[k]);
    }
    if (s.writes_b) {
      add_version(pair.versions[1], last_version[num_averages], b[i], group.versions_b);
    }
    if (pair.flipped) std::swap(span.sides[0], span.sides[1]);
    into.spans.push_back(span);
  }
  for (int k = 0; k < num_averages; ++k) {
    for (size_t i : left_to_torch) result.fallback_a.push_back(a[k * size + i]);
  }
  for (size_t i : left_to_torch) result.fallback_b.push_back(b[i]);
  for (size_t i = 0; i < result.groups.size(); ++i) {
    result.groups[i].spans = cpu::make_span_table(std::move(lists[i].spans),
                                                  std::move(lists[i].others), num_averages - 1);
  }
  return result;
}

void upload_tables([[maybe_unused]] Groups& groups, [[maybe_unused]] bool wait) {
#ifdef FUSED_EMA_WITH_CUDA
  FormerTables::all().free();
  for (Group& group : groups.groups) {
    if (!group.device.is_cuda()) continue;
    std::vector<char> bytes;
    const auto add = [&](const auto& table) {
      const Group::TableAt at{static_cast<int64_t>(bytes.size()), table.num_block_tiles,
                              table.num_warp_tiles()};
      const char* tiles = reinterpret_cast<const char*>(table.tiles.data());
      bytes.insert(bytes.end(), tiles, tiles + table.tiles.size() * sizeof(table.tiles[0]));
      return at;
    };
    const int num_averages = group.num_averages();
    for (int k = 0; k < num_averages; ++k) {
      group.pair_tables.push_back(add(make_tile_table(
          tile_shape(group.pair), num_averages == 1 ? group.spans.spans : pairs_of(group, k))));
    }
    for (int first = 0; first < num_averages; first += kMostAverages) {
      if (const int count = averages_from(group, first); count > 1) {
        group.averages_tables.push_back(
            add(make_tile_table(averages_shape(group.pair), averages_of(group, first, count))));
      }
    }
    const int64_t size = static_cast<int64_t>(bytes.size());
    const c10::DeviceGuard guard(group.device);
    // Pinned, so that the copy need not wait; torch's host allocator keeps it until it has run.
    const at::Tensor staged =
        at::empty({size}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    std::memcpy(staged.mutable_data_ptr(), bytes.data(), bytes.size());
    group.tables = at::empty({size}, at::TensorOptions().dtype(at::kByte).device(group.device));
    group.tables.copy_(staged, /*non_blocking=*/!wait);
    group.table_stream = current_stream(group.device);
  }
#endif
}

void check_device_momentum(const char* op, const Groups& groups, const Operation& operation) {
  if (!operation.device_momentum) return;
  const at::Device device = operation.device_momentum->device();
  const auto check = [&](at::Device other) {
    TORCH_CHECK_VALUE(other == device, "fused_ema.", op, ": momentum is a tensor on ", device,
                      " but the lists hold tensors on ", other,
                      "; pass a float, or a momentum on the tensors' device");
  };
  for (const Group& group : groups.groups) check(group.device);
  for (const at::Tensor& tensor : groups.fallback_a.get()) check(tensor.device());
}

void run(Groups& groups, const Operation& operation) {
  using Kind = Operation::Kind;
  const Tensors& a = groups.fallback_a.get();
  const Tensors& b = groups.fallback_b.get();
  std::optional<fallback::Temporaries> temporaries;
  std::vector<Tensors> parts;
  for (int k = 0; groups.num_averages > 1 && k < groups.num_averages; ++k) {
    const auto size = static_cast<int64_t>(b.size());
    parts.emplace_back(a.begin() + k * size, a.begin() + (k + 1) * size);
  }
  const auto emas_of = [&](int k) -> const Tensors& { return parts.empty() ? a : parts[k]; };
  if (!b.empty() && operation.kind == Kind::kUpdate) {
    const std::vector<double> one{operation.momentum};
    const auto& momenta = operation.momenta.empty() ? one : operation.momenta;
    temporaries = fallback::Temporaries::for_update(emas_of(0), b, momenta, operation.form);
  }
  if (!b.empty() && operation.kind == Kind::kSwap) {
    temporaries = fallback::Temporaries::for_swap(emas_of(operation.average));
  }
  for (Group& group : groups.groups) {
    if (group.spans.spans.empty()) continue;
#ifdef FUSED_EMA_WITH_CUDA
    if (group.device.is_cuda()) {
      run_on_cuda(group, operation);
      bump_written(group, operation, 0, 1, 1);  // all of them
      continue;
    }
#endif
    run_on_cpu(group, operation);
  }
  if (b.empty()) return;
  switch (operation.kind) {
    case Kind::kUpdate:
      for (int k = 0; k < groups.num_averages; ++k) {
        std::optional<at::Tensor> device_momentum = operation.device_momentum;
        if (device_momentum && device_momentum->dim() > 0) {
          device_momentum = device_momentum->select(0, k);
        }
        fallback::update(emas_of(k), b, k, device_momentum, operation.form, *temporaries);
      }
      return;
    case Kind::kSwap:
      return fallback::swap(emas_of(operation.average), b, *temporaries);
    case Kind::kCopyToA:
      return fallback::copy(emas_of(operation.average), b);
    case Kind::kCopyToB:
      return fallback::copy(b, emas_of(operation.average));
  }
}

}  // namespace fused_ema
