// Host side of a launch: grid, arguments, stream, launch check.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "loop.cuh"

namespace fused_ema::cuda {

// Kernel arguments hold 32,764 bytes from CUDA 12.1 on, 4 KB before.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif

// Beside the list: its three counts and the operation's arguments.
constexpr int kMostArgumentBytes = 128;

template <int S>
constexpr int kMaxSpansPerLaunch = (kArgumentBytes - kMostArgumentBytes) /
                                   static_cast<int>(sizeof(SpanOf<S>) + 2 * sizeof(uint32_t));

// The list itself as kernel arguments: nothing to upload, nothing to keep alive, safe to capture.
// What is searched stands together, so that a search reads few lines of the constant bank.
template <int S>
struct ListSource {
  uint32_t num_block_tiles;
  uint32_t num_warp_tiles;
  int32_t num_spans;
  // The number of tiles of the spans before.
  uint32_t first_block_tile[kMaxSpansPerLaunch<S>];
  uint32_t first_warp_tile[kMaxSpansPerLaunch<S>];
  SpanOf<S> spans[kMaxSpansPerLaunch<S>];

  __device__ TileOf<S> block_tile(const ShapeOf<S>& shape, uint32_t index) const {
    const int32_t i = find(index, first_block_tile);
    return block_tile_of(shape, spans[i], split(shape, spans[i]), index - first_block_tile[i],
                         static_cast<uint32_t>(i));
  }
  __device__ TileOf<S> warp_tile(const ShapeOf<S>& shape, uint32_t index) const {
    const int32_t i = find(index, first_warp_tile);
    return warp_tile_of(shape, spans[i], split(shape, spans[i]), index - first_warp_tile[i],
                        static_cast<uint32_t>(i));
  }

 private:
  // The last span that starts at or before index. Ten steps, the same for every thread of a warp,
  // so each is one read of the constant bank.
  __device__ int32_t find(uint32_t index, const uint32_t* first) const {
    int32_t low = 0;
    int32_t high = num_spans;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (first[middle] <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

template <typename Op, typename Source>
Status launch_source(const Source& source, const typename Op::Args& args, Stream stream) {
  static_assert(sizeof(Source) + sizeof(args) <= kArgumentBytes, "they fit a kernel's arguments");
  constexpr uint64_t kWarps = Op::kWalk.threads / kWarpSize;
  const uint64_t grid =
      uint64_t{source.num_block_tiles} + (uint64_t{source.num_warp_tiles} + kWarps - 1) / kWarps;
  if (grid == 0) return cudaSuccess;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  // Not <<<>>>, so that a host compiler reads this file too (tests/host/).
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<uint32_t>(grid);
  config.blockDim.x = Op::kWalk.threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, tile_loop_kernel<Op, Source>, source, args);
}

template <typename... T>
constexpr auto shape_of(Sides<T...>) {
  return tile_shape(static_cast<int>(sizeof(T))...);
}

template <typename Op>
Status launch(const WorkOf<Op::Types::kCount>& work, const typename Op::Args& args, Stream stream) {
  constexpr int S = Op::Types::kCount;
  if (work.spans == nullptr) {
    return launch_source<Op>(TableSource<S>{work.tiles, work.num_block_tiles, work.num_warp_tiles},
                             args, stream);
  }
  constexpr ShapeOf<S> kShape = shape_of(typename Op::Types{});
  ListSource<S> source;
  for (int64_t begin = 0; begin < work.num_spans; begin += kMaxSpansPerLaunch<S>) {
    const int64_t left = work.num_spans - begin;
    source.num_spans =
        static_cast<int32_t>(left < kMaxSpansPerLaunch<S> ? left : kMaxSpansPerLaunch<S>);
    source.num_block_tiles = 0;
    source.num_warp_tiles = 0;
    for (int32_t i = 0; i < source.num_spans; ++i) {
      const SpanOf<S>& span = work.spans[begin + i];
      const Split parts = split(kShape, span);
      source.spans[i] = span;
      source.first_block_tile[i] = source.num_block_tiles;
      source.first_warp_tile[i] = source.num_warp_tiles;
      source.num_block_tiles += static_cast<uint32_t>(parts.num_block_tiles);
      source.num_warp_tiles += static_cast<uint32_t>(parts.num_warp_tiles);
    }
    const Status status = launch_source<Op>(source, args, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fused_ema::cuda
