// What Python calls: one operation by the CUDA kernels' own code, run on this processor.
#include "../../csrc/cuda/launch.h"
#include "cuda_runtime.h"

using namespace fused_ema;

namespace {

// The largest list of block and warp tiles that a launch may take; as groups.cpp makes it.
template <typename Launch>
int run(DtypePair pair, const uint64_t* a, const uint64_t* b, const int64_t* n, int64_t num_spans,
        bool by_table, const Launch& launch) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < num_spans; ++i) {
    spans.push_back(Span{reinterpret_cast<void*>(a[i]), reinterpret_cast<void*>(b[i]), n[i]});
  }
  cuda::Work work;
  TileTable table;
  if (by_table) {
    table = make_tile_table(tile_shape(pair), spans);
    work.tiles = table.tiles.data();
    work.num_block_tiles = static_cast<uint32_t>(table.num_block_tiles);
    work.num_warp_tiles = static_cast<uint32_t>(table.num_warp_tiles());
  } else {
    work.spans = spans.data();
    work.num_spans = num_spans;
  }
  host::num_launches = 0;
  const cuda::Status status = launch(work);
  return status == cudaSuccess ? host::num_launches : -static_cast<int>(status);
}

}  // namespace

// All return the number of launches, or minus the error.
extern "C" {

int host_update(int pair, int form, double momentum, int momentum_in_memory, const uint64_t* a,
                const uint64_t* b, const int64_t* n, int64_t num_spans, int by_table) {
  const cuda::Momentum given{momentum_in_memory ? -1.0 : momentum,
                             momentum_in_memory ? &momentum : nullptr};
  const auto dtypes = static_cast<DtypePair>(pair);
  return run(dtypes, a, b, n, num_spans, by_table, [&](const cuda::Work& work) {
    return cuda::launch_update(dtypes, static_cast<Form>(form), work, given, nullptr);
  });
}

int host_swap(int pair, const uint64_t* a, const uint64_t* b, const int64_t* n, int64_t num_spans,
              int by_table) {
  const auto dtypes = static_cast<DtypePair>(pair);
  return run(dtypes, a, b, n, num_spans, by_table,
             [&](const cuda::Work& work) { return cuda::launch_swap(dtypes, work, nullptr); });
}

int host_copy(int pair, int to_a, const uint64_t* a, const uint64_t* b, const int64_t* n,
              int64_t num_spans, int by_table) {
  const auto dtypes = static_cast<DtypePair>(pair);
  return run(dtypes, a, b, n, num_spans, by_table, [&](const cuda::Work& work) {
    return cuda::launch_copy(dtypes, to_a != 0, work, nullptr);
  });
}

}  // extern "C"
