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
c10::Stream current_stream(at::Device device) {
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
  if (writes_first) bump(group.versions_a);
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
      cpu::Work work{cpu::update_kernel(group.pair, operation.form), operation.momentum};
      if (operation.form == Form::kMulAdd) {
        work.one_at_a_time = cpu::one_at_a_time_kernel(group.pair);
        const bool nested = at::in_parallel_region();
        work.torch_loop = {nested ? 1 : at::get_num_threads(), torch_step()};
      }
      return work;
    }
    case Kind::kSwap:
      return {cpu::swap_kernel(group.pair)};
    default: {
      const bool to_a = (operation.kind == Kind::kCopyToA) != group.flipped;
      const PairDtypes dtypes = dtypes_of(group.pair);
      const int64_t bytes = group.spans.num_elements * size_of(to_a ? dtypes.a : dtypes.b);
      return {cpu::copy_kernel(group.pair, to_a, bytes >= cpu::kStreamingBytes)};
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

void run_on_cuda(Group& group, const Operation& operation) {
  using Kind = Operation::Kind;
  const c10::DeviceGuard guard(group.device);
  const c10::Stream stream = current_stream(group.device);
  cuda::Work work;
  if (group.table.defined()) {
    work.tiles = static_cast<const Tile*>(group.table.const_data_ptr());
    work.num_block_tiles = static_cast<uint32_t>(group.num_block_tiles);
    work.num_warp_tiles = static_cast<uint32_t>(group.num_warp_tiles);
    // The allocator must not hand the table to another tensor while this stream reads it.
    if (stream != *group.table_stream) group.table.record_stream(stream);
    if (cuda::is_capturing(stream.native_handle())) {
      keep_table_with_graph(group.table, stream.native_handle());
    }
  } else {
    work.spans = group.spans.spans.data();
    work.num_spans = static_cast<int64_t>(group.spans.spans.size());
  }
  cuda::Status status = 0;
  switch (operation.kind) {
    case Kind::kUpdate: {
      cuda::Momentum momentum{operation.momentum};
      if (operation.device_momentum) {
        momentum.device = operation.device_momentum->const_data_ptr<double>();
      }
      status =
          cuda::launch_update(group.pair, operation.form, work, momentum, stream.native_handle());
      break;
    }
    case Kind::kSwap:
      status = cuda::launch_swap(group.pair, work, stream.native_handle());
      break;
    case Kind::kCopyToA:
    case Kind::kCopyToB:
      status = cuda::launch_copy(group.pair, (operation.kind == Kind::kCopyToA) != group.flipped,
                                 work, stream.native_handle());
      break;
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
                   const CheckedPairs& checked) {
  Groups result;
  std::vector<std::vector<Span>> spans;
  std::optional<at::Device> last_device;
  bool last_served = false;
  const void* last_version[2] = {nullptr, nullptr};
  for (size_t i = 0; i < checked.size(); ++i) {
    const CheckedPair& pair = checked[i];
    if (pair.device != last_device) {
      last_device = pair.device;
      last_served = std::strcmp(service_of(pair.device).backend, "foreach") != 0;
    }
    if (!last_served || !pair.has_plain_memory) {
      result.fallback_a.push_back(a[i]);
      result.fallback_b.push_back(b[i]);
      continue;
    }
    Group& group = group_for(result.groups, pair);
    ++group.num_pairs;
    if (spans.size() < result.groups.size()) {
      // Most often one group takes all.
      spans.emplace_back().reserve(checked.size() - i);
      if (s.writes_a) group.versions_a.reserve(checked.size() - i);
      if (s.writes_b) group.versions_b.reserve(checked.size() - i);
    }
    if (pair.numel == 0) continue;
    const auto address = [&](int side, const at::Tensor& tensor) {
      const bool written = side == 0 ? s.writes_a : s.writes_b;
      // The mutable pointer of a lazily copied tensor is its own memory.
      return written && pair.is_lazy[side] ? tensor.mutable_data_ptr()
                                           : const_cast<void*>(pair.data[side]);
    };
    // Views of one flat tensor, which is how emas are best kept, stand side by side.
    const auto add_version = [&](int side, const at::Tensor& tensor, Versions& versions) {
      const void* version = pair.versions[side];
      if (version != nullptr && version != last_version[side]) {
        versions.push_back(tensor.unsafeGetTensorImpl());
      }
      last_version[side] = version;
    };
    Span span{address(0, a[i]), address(1, b[i]), pair.numel};
    if (s.writes_a) add_version(0, a[i], group.versions_a);
    if (s.writes_b) add_version(1, b[i], group.versions_b);
    if (pair.flipped) std::swap(span.a, span.b);
    spans[&group - result.groups.data()].push_back(span);
  }
  for (size_t i = 0; i < result.groups.size(); ++i) {
    result.groups[i].spans = cpu::make_span_table(std::move(spans[i]));
  }
  return result;
}

void upload_tables(Groups& groups, bool wait) {
#ifdef FUSED_EMA_WITH_CUDA
  FormerTables::all().free();
#endif
  for (Group& group : groups.groups) {
    if (!group.device.is_cuda()) continue;
    const TileTable table = make_tile_table(tile_shape(group.pair), group.spans.spans);
    const int64_t bytes = static_cast<int64_t>(table.tiles.size() * sizeof(Tile));
    const c10::DeviceGuard guard(group.device);
    // Pinned, so that the copy need not wait; torch's host allocator keeps it until it has run.
    const at::Tensor staged =
        at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    std::memcpy(staged.mutable_data_ptr(), table.tiles.data(), bytes);
    group.table = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(group.device));
    group.table.copy_(staged, /*non_blocking=*/!wait);
    group.table_stream = current_stream(group.device);
    group.num_block_tiles = table.num_block_tiles;
    group.num_warp_tiles = table.num_warp_tiles();
  }
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
  if (operation.kind == Kind::kUpdate) {
    temporaries = fallback::Temporaries::for_update(a, b, operation.momentum, operation.form);
  }
  if (operation.kind == Kind::kSwap) temporaries = fallback::Temporaries::for_swap(a);
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
  if (a.empty()) return;
  switch (operation.kind) {
    case Kind::kUpdate:
      return fallback::update(a, b, operation.momentum, operation.device_momentum, operation.form,
                              *temporaries);
    case Kind::kSwap:
      return fallback::swap(a, b, *temporaries);
    case Kind::kCopyToA:
      return fallback::copy(a, b);
    case Kind::kCopyToB:
      return fallback::copy(b, a);
  }
}

}  // namespace fused_ema
