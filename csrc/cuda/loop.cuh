// Device only. The one tile loop that every operation runs in.
//
// An operation is a struct with
//   kReadsA, kReadsB, kWritesA, kWritesB   which sides move
//   Args                                   what the host passes, by value
//   kWalk                                  how the threads of a block walk a tile
//   Op(const Args&)                        once a thread, before the first load
//   is_idle                                whether there is nothing to do, the same for all threads
//   operator()(A& a, B& b)                 one element, in storage types
//
// A source says which tile a block or a warp works on: TableSource reads a plan's table from device
// memory, ListSource (launch.cuh) finds it in the kernel's arguments.
#pragma once

#include "../tiles.h"
#include "vec.cuh"

namespace fused_ema::cuda {

// How a block walks its tile. What was fastest on an H200 differs by what an operation writes:
// bench/NOTES.md has the figures, bench/gpu/variants.py measures others.
struct Walk {
  int threads;        // of a block
  int step;           // vectors of a side that a thread loads before it stores
  int blocks_per_sm;  // that must fit, which bounds the registers
};

struct TableSource {
  const Tile* tiles;
  uint32_t num_block_tiles;
  uint32_t num_warp_tiles;

  __device__ Tile block_tile(const TileShape&, uint32_t index) const { return tiles[index]; }
  __device__ Tile warp_tile(const TileShape&, uint32_t index) const {
    return tiles[num_block_tiles + index];
  }
};

// kStep vectors a thread, from vector `first` on, team_size apart.
template <bool kFull, bool kAlignedB, int kStep, typename Op, typename A, typename B>
__device__ __forceinline__ void run_step(const Op& op, A* __restrict__ a, B* __restrict__ b,
                                         int num_vectors, int first, int team_size) {
  constexpr int kVec = tile_shape(sizeof(A), sizeof(B)).vec;
  Vec<A, kVec> va[kStep];
  Vec<B, kVec> vb[kStep];
#pragma unroll
  for (int u = 0; u < kStep; ++u) {
    const int i = first + u * team_size;
    if (kFull || i < num_vectors) {
      if constexpr (Op::kReadsA) load_vec<true>(va[u], a + i * kVec);
    }
  }
  // One side after the other: alternately a swap in steps of two loses 7 % on an H200.
  asm volatile("" ::: "memory");
#pragma unroll
  for (int u = 0; u < kStep; ++u) {
    const int i = first + u * team_size;
    if (kFull || i < num_vectors) {
      if constexpr (Op::kReadsB) load_vec<kAlignedB>(vb[u], b + i * kVec);
    }
  }
#pragma unroll
  for (int u = 0; u < kStep; ++u) {
    const int i = first + u * team_size;
    if (kFull || i < num_vectors) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        if constexpr (Op::kReadsA && !kFull) stay_as_loaded(va[u].e[k]);
        if constexpr (Op::kReadsB && !kFull) stay_as_loaded(vb[u].e[k]);
        op(va[u].e[k], vb[u].e[k]);
      }
      if constexpr (Op::kWritesA) store_vec<true>(a + i * kVec, va[u]);
      if constexpr (Op::kWritesB) store_vec<kAlignedB>(b + i * kVec, vb[u]);
    }
  }
}

// The vectors of a tile, in steps whose every load is issued before their first store. kFull: all
// of them exist, no bounds to check.
template <bool kFull, bool kAlignedB, typename Op, typename A, typename B>
__device__ __forceinline__ void run_vectors(const Op& op, A* __restrict__ a, B* __restrict__ b,
                                            int num_vectors, int rank) {
  constexpr int kTeam = kFull ? Op::kWalk.threads : kWarpSize;
  constexpr int kAThread = (kFull ? kBlockTileVectors : kWarpTileVectors) / kTeam;
  // Where b moves by element, steps of one keep too little on its way, but two of 8 elements a
  // vector take more registers than there are.
  constexpr int kLeast = kAlignedB || sizeof(A) == 2 ? 1 : 2;
  constexpr int kWanted = Op::kWalk.step < kLeast ? kLeast : Op::kWalk.step;
  constexpr int kStep = kWanted < kAThread ? kWanted : kAThread;
  static_assert(kAThread % kStep == 0, "a tile is walked in whole steps");
#pragma unroll
  for (int first = 0; first < kAThread; first += kStep) {
    // Loads of a step stay behind the stores of the one before: more would need more registers.
    if (first > 0) asm volatile("" ::: "memory");
    run_step<kFull, kAlignedB, kStep>(op, a, b, num_vectors, first * kTeam + rank, kTeam);
  }
}

template <bool kFull, typename Op, typename A, typename B>
__device__ __forceinline__ void run_body(const Op& op, A* a, B* b, int num_vectors, int rank) {
  if (is_aligned<tile_shape(sizeof(A), sizeof(B)).vec>(b)) {
    run_vectors<kFull, true>(op, a, b, num_vectors, rank);
  } else {
    run_vectors<kFull, false>(op, a, b, num_vectors, rank);
  }
}

// Any number of elements up to a warp tile, from any address.
template <typename Op, typename A, typename B>
__device__ __forceinline__ void run_warp_tile(const Op& op, const Tile& tile, int lane) {
  constexpr TileShape kShape = tile_shape(sizeof(A), sizeof(B));
  A* a = global_pointer<A>(tile.a);
  B* b = global_pointer<B>(tile.b);
  const int n = static_cast<int>(tile.n);
  int head = head_elements(kShape, reinterpret_cast<uintptr_t>(a));
  head = head < n ? head : n;
  const int num_vectors = (n - head) / kShape.vec;
  const int in_vectors = num_vectors * kShape.vec;
  // Head and tail together hold fewer than 2 * vec <= 16 elements: at most one a lane.
  static_assert(2 * kShape.vec <= kWarpSize, "a lane takes at most one odd element");
  const int odd = lane < head ? lane : lane + in_vectors;
  const bool has_odd = odd < n && lane < n - in_vectors;
  A odd_a;
  B odd_b;
  if (has_odd) {
    if constexpr (Op::kReadsA) odd_a = a[odd];
    if constexpr (Op::kReadsB) odd_b = b[odd];
  }
  run_body<false>(op, a + head, b + head, num_vectors, lane);
  if (has_odd) {
    if constexpr (Op::kReadsA) stay_as_loaded(odd_a);
    if constexpr (Op::kReadsB) stay_as_loaded(odd_b);
    op(odd_a, odd_b);
    if constexpr (Op::kWritesA) a[odd] = odd_a;
    if constexpr (Op::kWritesB) b[odd] = odd_b;
  }
}

template <typename Op, typename A, typename B, typename Source>
__global__ void __launch_bounds__(Op::kWalk.threads, Op::kWalk.blocks_per_sm)
    tile_loop_kernel(const __grid_constant__ Source source,
                     const __grid_constant__ typename Op::Args args) {
  constexpr TileShape kShape = tile_shape(sizeof(A), sizeof(B));
  const Op op(args);
  if (op.is_idle) return;
  if (blockIdx.x < source.num_block_tiles) {
    const Tile tile = source.block_tile(kShape, blockIdx.x);
    run_body<true>(op, global_pointer<A>(tile.a), global_pointer<B>(tile.b), 0,
                   static_cast<int>(threadIdx.x));
    return;
  }
  constexpr uint32_t kWarps = Op::kWalk.threads / kWarpSize;
  const uint32_t index = (blockIdx.x - source.num_block_tiles) * kWarps + threadIdx.x / kWarpSize;
  if (index < source.num_warp_tiles) {
    run_warp_tile<Op, A, B>(op, source.warp_tile(kShape, index),
                            static_cast<int>(threadIdx.x % kWarpSize));
  }
}

}  // namespace fused_ema::cuda
