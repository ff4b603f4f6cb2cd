// Device only. The one tile loop that every operation runs in.
//
// An operation is a struct with
//   Types = Sides<A, B, ...>   what its sides' elements are; the first is as wide as any
//   kReads, kWrites            which of the sides move, a bit each from the lowest
//   Args                       what the host passes, by value
//   kWalk                      how the threads of a block walk a tile
//   Op(const Args&)            once a thread, before the first load
//   takes<side>()              whether this launch has the side; SidesOf says always
//   is_idle                    whether there is nothing to do, the same for all threads
//   operator()(A&, B&, ...)    one element, in storage types
//
// A source says which tile a block or a warp works on: TableSource reads a plan's table from device
// memory, ListSource (launch.cuh) finds it in the kernel's arguments.
#pragma once

#include <utility>

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

template <typename... T>
struct Sides {
  static constexpr int kCount = sizeof...(T);
};

// An operation's base: what its sides are, and that every launch has them all.
template <typename... T>
struct SidesOf {
  using Types = Sides<T...>;
  template <int kSide>
  static __device__ constexpr bool takes() {
    return true;
  }
};

template <int S>
struct TableSource {
  const TileOf<S>* tiles;
  uint32_t num_block_tiles;
  uint32_t num_warp_tiles;

  __device__ TileOf<S> block_tile(const ShapeOf<S>&, uint32_t index) const { return tiles[index]; }
  __device__ TileOf<S> warp_tile(const ShapeOf<S>&, uint32_t index) const {
    return tiles[num_block_tiles + index];
  }
};

// Something of each side, found by its number.
template <int kSide, typename T>
struct OfSide {
  T value;
};
template <int kSide, typename T>
__device__ __forceinline__ T& of(OfSide<kSide, T>& all) {
  return all.value;
}

template <typename Op, typename Types, typename Numbers>
struct LoopOver;
template <typename Op>
using Loop = LoopOver<Op, typename Op::Types, std::make_integer_sequence<int, Op::Types::kCount>>;

template <typename Op, typename... T, int... kSide>
struct LoopOver<Op, Sides<T...>, std::integer_sequence<int, kSide...>> {
  static constexpr int kCount = sizeof...(T);
  static constexpr int kVec = tile_shape(static_cast<int>(sizeof(T))...).vec;
  static constexpr bool kIsNarrow = tile_shape(static_cast<int>(sizeof(T))...).sizes[0] == 2;

  template <int kI>
  static __device__ constexpr bool reads() {
    return (Op::kReads >> kI & 1) != 0;
  }
  template <int kI>
  static __device__ constexpr bool writes() {
    return (Op::kWrites >> kI & 1) != 0;
  }

  template <int kStep>
  struct Loaded : OfSide<kSide, Vec<T, kVec>[kStep]>... {};
  struct Odd : OfSide<kSide, T>... {};

  template <int kI, bool kFull, bool kAligned, int kStep, typename U>
  static __device__ __forceinline__ void load_side(const Op& op, Vec<U, kVec> (&v)[kStep],
                                                   const U* __restrict__ at, int num_vectors,
                                                   int first, int team_size) {
    if constexpr (reads<kI>()) {
      if (op.template takes<kI>()) {
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          const int i = first + u * team_size;
          if (kFull || i < num_vectors) load_vec<kAligned || kI == 0>(v[u], at + i * kVec);
        }
      }
    }
    // One side after the other: alternately a swap in steps of two loses 7 % on an H200.
    if constexpr (kI + 1 < kCount) asm volatile("" ::: "memory");
  }

  template <int kI, bool kAligned, typename U>
  static __device__ __forceinline__ void store_side(const Op& op, U* at, const Vec<U, kVec>& v) {
    if constexpr (writes<kI>()) {
      if (op.template takes<kI>()) store_vec<kAligned || kI == 0>(at, v);
    }
  }

  template <int kI, typename U>
  static __device__ __forceinline__ void keep_as_loaded(U& value) {
    if constexpr (reads<kI>()) stay_as_loaded(value);
  }

  // kStep vectors a thread, from vector `first` on, team_size apart.
  template <bool kFull, bool kAligned, int kStep>
  static __device__ __forceinline__ void run_step(const Op& op, int num_vectors, int first,
                                                  int team_size, T* __restrict__... at) {
    Loaded<kStep> v;
    (load_side<kSide, kFull, kAligned>(op, of<kSide>(v), at, num_vectors, first, team_size), ...);
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int i = first + u * team_size;
      if (kFull || i < num_vectors) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          if constexpr (!kFull) (keep_as_loaded<kSide>(of<kSide>(v)[u].e[k]), ...);
          op(of<kSide>(v)[u].e[k]...);
        }
        (store_side<kSide, kAligned>(op, at + i * kVec, of<kSide>(v)[u]), ...);
      }
    }
  }

  // The vectors of a tile, in steps whose every load is issued before their first store. kFull: all
  // of them exist, no bounds to check.
  template <bool kFull, bool kAligned>
  static __device__ __forceinline__ void run_vectors(const Op& op, int num_vectors, int rank,
                                                     T* __restrict__... at) {
    constexpr int kTeam = kFull ? Op::kWalk.threads : kWarpSize;
    constexpr int kAThread = (kFull ? kBlockTileVectors : kWarpTileVectors) / kTeam;
    // Where b moves by element, steps of one keep too little on its way, but two of 8 elements a
    // vector, or of more than two sides, take more registers than there are.
    constexpr int kLeast = kAligned || kIsNarrow || kCount > 2 ? 1 : 2;
    constexpr int kWanted = Op::kWalk.step < kLeast ? kLeast : Op::kWalk.step;
    constexpr int kStep = kWanted < kAThread ? kWanted : kAThread;
    static_assert(kAThread % kStep == 0, "a tile is walked in whole steps");
#pragma unroll
    for (int first = 0; first < kAThread; first += kStep) {
      // Loads of a step stay behind the stores of the one before: more would need more registers.
      if (first > 0) asm volatile("" ::: "memory");
      run_step<kFull, kAligned, kStep>(op, num_vectors, first * kTeam + rank, kTeam, at...);
    }
  }

  template <bool kFull>
  static __device__ __forceinline__ void run_body(const Op& op, int num_vectors, int rank,
                                                  T*... at) {
    // The first side is: a tile begins so.
    if (((kSide == 0 || is_aligned<kVec>(at)) && ...)) {
      run_vectors<kFull, true>(op, num_vectors, rank, at...);
    } else {
      run_vectors<kFull, false>(op, num_vectors, rank, at...);
    }
  }

  template <int kI, typename U>
  static __device__ __forceinline__ void load_odd(const Op& op, U& to, const U* from) {
    if constexpr (reads<kI>()) {
      if (op.template takes<kI>()) to = *from;
    }
  }
  template <int kI, typename U>
  static __device__ __forceinline__ void store_odd(const Op& op, U* to, const U& from) {
    if constexpr (writes<kI>()) {
      if (op.template takes<kI>()) *to = from;
    }
  }

  // Any number of elements up to a warp tile, from any address.
  static __device__ __forceinline__ void run_warp_tile(const Op& op, int n, int lane, T*... at) {
    constexpr ShapeOf<kCount> kShape = tile_shape(static_cast<int>(sizeof(T))...);
    int head = head_elements(kShape, first_of(reinterpret_cast<uintptr_t>(at)...));
    head = head < n ? head : n;
    const int num_vectors = (n - head) / kVec;
    const int in_vectors = num_vectors * kVec;
    // Head and tail together hold fewer than 2 * vec <= 16 elements: at most one a lane.
    static_assert(2 * kVec <= kWarpSize, "a lane takes at most one odd element");
    const int odd = lane < head ? lane : lane + in_vectors;
    const bool has_odd = odd < n && lane < n - in_vectors;
    Odd odds;
    if (has_odd) (load_odd<kSide>(op, of<kSide>(odds), at + odd), ...);
    run_body<false>(op, num_vectors, lane, (at + head)...);
    if (has_odd) {
      (keep_as_loaded<kSide>(of<kSide>(odds)), ...);
      op(of<kSide>(odds)...);
      (store_odd<kSide>(op, at + odd, of<kSide>(odds)), ...);
    }
  }

  template <typename... Others>
  static __device__ __forceinline__ uintptr_t first_of(uintptr_t first, Others...) {
    return first;
  }

  template <typename Source>
  static __device__ __forceinline__ void run(const Source& source, const Op& op) {
    constexpr ShapeOf<kCount> kShape = tile_shape(static_cast<int>(sizeof(T))...);
    if (blockIdx.x < source.num_block_tiles) {
      const TileOf<kCount> tile = source.block_tile(kShape, blockIdx.x);
      run_body<true>(op, 0, static_cast<int>(threadIdx.x), global_pointer<T>(tile.sides[kSide])...);
      return;
    }
    constexpr uint32_t kWarps = Op::kWalk.threads / kWarpSize;
    const uint32_t index = (blockIdx.x - source.num_block_tiles) * kWarps + threadIdx.x / kWarpSize;
    if (index < source.num_warp_tiles) {
      const TileOf<kCount> tile = source.warp_tile(kShape, index);
      run_warp_tile(op, static_cast<int>(tile.n), static_cast<int>(threadIdx.x % kWarpSize),
                    global_pointer<T>(tile.sides[kSide])...);
    }
  }
};

template <typename Op, typename Source>
__global__ void __launch_bounds__(Op::kWalk.threads, Op::kWalk.blocks_per_sm)
    tile_loop_kernel(const __grid_constant__ Source source,
                     const __grid_constant__ typename Op::Args args) {
  const Op op(args);
  if (op.is_idle) return;
  Loop<Op>::run(source, op);
}

}  // namespace fused_ema::cuda
