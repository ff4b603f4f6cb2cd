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

// A span, and the number of tiles of the spans before it.
struct ListEntry {
  Span span;
  uint32_t first_block_tile;
  uint32_t first_warp_tile;
};

// Room beside the list: its three counts and the operation's arguments.
constexpr int kMaxSpansPerLaunch = (kArgumentBytes - 128) / static_cast<int>(sizeof(ListEntry));

// The list itself as kernel arguments: nothing to upload, nothing to keep alive, safe to capture.
struct ListSource {
  uint32_t num_block_tiles;
  uint32_t num_warp_tiles;
  int32_t num_spans;
  ListEntry entries[kMaxSpansPerLaunch];

  __device__ Tile block_tile(const TileShape& shape, uint32_t index) const {
    const int32_t i = find(index, &ListEntry::first_block_tile);
    const ListEntry& entry = entries[i];
    return block_tile_of(shape, entry.span, split(shape, entry.span),
                         index - entry.first_block_tile, static_cast<uint32_t>(i));
  }
  __device__ Tile warp_tile(const TileShape& shape, uint32_t index) const {
    const int32_t i = find(index, &ListEntry::first_warp_tile);
    const ListEntry& entry = entries[i];
    return warp_tile_of(shape, entry.span, split(shape, entry.span), index - entry.first_warp_tile,
                        static_cast<uint32_t>(i));
  }

 private:
  // The last entry that starts at or before index. Ten steps, the same for every thread of a warp,
  // so each is one read of the constant bank.
  __device__ int32_t find(uint32_t index, uint32_t ListEntry::*first) const {
    int32_t low = 0;
    int32_t high = num_spans;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (entries[middle].*first <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

template <typename Op, typename A, typename B, typename Source>
Status launch_source(const Source& source, const typename Op::Args& args, Stream stream) {
  const uint64_t grid = uint64_t{source.num_block_tiles} +
                        (uint64_t{source.num_warp_tiles} + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (grid == 0) return cudaSuccess;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  // Not <<<>>>, so that a host compiler reads this file too (tests/host/).
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<uint32_t>(grid);
  config.blockDim.x = kThreadsPerBlock;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, tile_loop_kernel<Op, A, B, Source>, source, args);
}

template <typename Op, typename A, typename B>
Status launch(const Work& work, const typename Op::Args& args, Stream stream) {
  if (work.spans == nullptr) {
    return launch_source<Op, A, B>(
        TableSource{work.tiles, work.num_block_tiles, work.num_warp_tiles}, args, stream);
  }
  constexpr TileShape kShape = tile_shape(sizeof(A), sizeof(B));
  ListSource source;
  for (int64_t begin = 0; begin < work.num_spans; begin += kMaxSpansPerLaunch) {
    const int64_t left = work.num_spans - begin;
    source.num_spans = static_cast<int32_t>(left < kMaxSpansPerLaunch ? left : kMaxSpansPerLaunch);
    source.num_block_tiles = 0;
    source.num_warp_tiles = 0;
    for (int32_t i = 0; i < source.num_spans; ++i) {
      const Span& span = work.spans[begin + i];
      const Split parts = split(kShape, span);
      source.entries[i] = ListEntry{span, source.num_block_tiles, source.num_warp_tiles};
      source.num_block_tiles += static_cast<uint32_t>(parts.num_block_tiles);
      source.num_warp_tiles += static_cast<uint32_t>(parts.num_warp_tiles);
    }
    const Status status = launch_source<Op, A, B>(source, args, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fused_ema::cuda
