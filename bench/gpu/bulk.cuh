// A variant of the tile loop (bench/gpu/variants.py): Hopper's bulk copies bring a block tile into
// shared memory. One thread asks for both sides, all wait for them, and the stores go to memory
// directly.
#pragma once

#include <cuda/barrier>
#include <cuda/ptx>
#include <utility>

#include "../tiles.h"
#include "vec.cuh"

namespace fused_ema::cuda {

// Elements of one side, if it is read.
template <bool kRead, typename T, int kElements>
__device__ __forceinline__ uint32_t
bulk_load(T* shared, const T* global, ::cuda::barrier<::cuda::thread_scope_block>& barrier) {
  if constexpr (!kRead) return 0;
  constexpr uint32_t kBytes = kElements * sizeof(T);
  ::cuda::device::memcpy_async_tx(shared, global, ::cuda::aligned_size_t<kVectorBytes>(kBytes),
                                  barrier);
  return kBytes;
}

template <typename Op, typename A, typename B>
__device__ __forceinline__ void run_bulk_tile(const Op& op, A* a, B* b) {
  using Barrier = ::cuda::barrier<::cuda::thread_scope_block>;
  constexpr TileShape kShape = tile_shape(sizeof(A), sizeof(B));
  constexpr int kVec = kShape.vec;
  constexpr int kTile = kShape.block_tile();
  __shared__ alignas(128) A shared_a[(Op::kReads & 1) != 0 ? kTile : 1];
  __shared__ alignas(128) B shared_b[(Op::kReads & 2) != 0 ? kTile : 1];
  __shared__ alignas(Barrier) unsigned char barrier_memory[sizeof(Barrier)];
  Barrier& barrier = *reinterpret_cast<Barrier*>(barrier_memory);
  const int rank = static_cast<int>(threadIdx.x);
  if (rank == 0) {
    init(&barrier, Op::kWalk.threads);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();
  Barrier::arrival_token token;
  if (rank == 0) {
    const uint32_t bytes = bulk_load<(Op::kReads & 1) != 0, A, kTile>(shared_a, a, barrier) +
                           bulk_load<(Op::kReads & 2) != 0, B, kTile>(shared_b, b, barrier);
    token = ::cuda::device::barrier_arrive_tx(barrier, 1, bytes);
  } else {
    token = barrier.arrive();
  }
  barrier.wait(std::move(token));
  // Not unrolled: what is in shared memory needs no registers to wait in.
#pragma unroll 1
  for (int i = rank; i < kBlockTileVectors; i += Op::kWalk.threads) {
    Vec<A, kVec> va;
    Vec<B, kVec> vb;
    if constexpr ((Op::kReads & 1) != 0) load_vec<true>(va, shared_a + i * kVec);
    if constexpr ((Op::kReads & 2) != 0) load_vec<true>(vb, shared_b + i * kVec);
#pragma unroll
    for (int k = 0; k < kVec; ++k) op(va.e[k], vb.e[k]);
    if constexpr ((Op::kWrites & 1) != 0) store_vec<true>(a + i * kVec, va);
    if constexpr ((Op::kWrites & 2) != 0) store_vec<true>(b + i * kVec, vb);
  }
}

}  // namespace fused_ema::cuda
