// From sizes and addresses to tiles: how a list of tensors, side by side, is cut into equal work.
//
// An operation has sides: an ema and its param, or several emas and the param of all. A block tile
// is work for one CUDA block, a warp tile for one warp, so that 10,000 tensors of 64 elements are
// 10,000 warps and not 10,000 blocks. A span is cut, in order of address, into
//
//   [head] one warp tile up to the first aligned element, where there is such a head
//   [full block tiles] aligned and full: the kernel's fast path, no bounds checks
//   [the rest] warp tiles
//
// A span that fits one warp tile is one, head included. Pure C++: no torch, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype_pairs.h"

#if defined(__CUDACC__)
#define FUSED_EMA_HOST_DEVICE __host__ __device__
#else
#define FUSED_EMA_HOST_DEVICE
#endif

namespace fused_ema {

constexpr int kVectorBytes = 16;
constexpr int kWarpSize = 32;

// One tensor on each of S sides, all of n elements.
template <int S>
struct SpanOf {
  void* sides[S];
  int64_t n;
};
// A pair.
using Span = SpanOf<2>;

// Consecutive elements of one span. 32 bits count a tile's elements; a tensor's need 64.
template <int S>
struct TileOf {
  void* sides[S];
  uint32_t n;
  uint32_t span;  // its index in the list
};
using Tile = TileOf<2>;

// What a kernel takes of a list in one pass over its params; of a longer one, in several.
constexpr int kMostAverages = 4;
// These averages and the param. Of fewer averages the sides that are missing repeat the first.
constexpr int kAveragesSides = kMostAverages + 1;

// Vectors of a tile. How a block's threads walk them is an operation's own affair (cuda/loop.cuh),
// so that one table serves a plan's every operation. 16 KB of side a: with pieces of 4 KB the
// reads of the table cost a swap a quarter of its speed on an H200, with these nothing.
constexpr int kBlockTileVectors = 1024;
constexpr int kWarpTileVectors = 128;

// Elements a thread takes at once, and the tiles that follow. A vector has 16 bytes of the first
// side, which is as wide as any, so that neighbouring threads fill whole sectors in every access.
template <int S>
struct ShapeOf {
  int sizes[S];
  int vec;
  FUSED_EMA_HOST_DEVICE constexpr int warp_tile() const { return kWarpTileVectors * vec; }
  FUSED_EMA_HOST_DEVICE constexpr int block_tile() const { return kBlockTileVectors * vec; }
};
using TileShape = ShapeOf<2>;

template <typename... Size>
FUSED_EMA_HOST_DEVICE constexpr ShapeOf<1 + sizeof...(Size)> tile_shape(int first, Size... others) {
  return {{first, others...}, kVectorBytes / first};
}
constexpr TileShape tile_shape(DtypePair pair) {
  return tile_shape(size_of(dtypes_of(pair).a), size_of(dtypes_of(pair).b));
}
// Of several averages and their param.
constexpr ShapeOf<kAveragesSides> averages_shape(DtypePair pair) {
  const int ema = size_of(dtypes_of(pair).a);
  return tile_shape(ema, ema, ema, ema, size_of(dtypes_of(pair).b));
}

// Elements before the first whole vector of the first side; and of the others, where any head
// aligns them too.
template <int S>
FUSED_EMA_HOST_DEVICE constexpr int head_elements(const ShapeOf<S>& shape, uintptr_t first) {
  const int past = static_cast<int>(first / shape.sizes[0] % shape.vec);
  return (shape.vec - past) % shape.vec;
}

// How many tiles of which kind one span gives.
struct Split {
  int head;  // 0 where the span is one warp tile
  int64_t num_block_tiles;
  int64_t num_warp_tiles;
};

template <int S>
FUSED_EMA_HOST_DEVICE inline Split split(const ShapeOf<S>& shape, const SpanOf<S>& span) {
  const int64_t warp_tile = shape.warp_tile();
  const int64_t block_tile = shape.block_tile();
  if (span.n <= warp_tile) return Split{0, 0, span.n > 0 ? 1 : 0};
  const int head = head_elements(shape, reinterpret_cast<uintptr_t>(span.sides[0]));
  const int64_t body = span.n - head;
  const int64_t rest = body % block_tile;
  return Split{head, body / block_tile, (head > 0 ? 1 : 0) + (rest + warp_tile - 1) / warp_tile};
}

template <int S>
FUSED_EMA_HOST_DEVICE inline TileOf<S> tile_at(const ShapeOf<S>& shape, const SpanOf<S>& span,
                                               int64_t begin, int64_t n, uint32_t index) {
  TileOf<S> tile;
  for (int side = 0; side < S; ++side) {
    tile.sides[side] = static_cast<char*>(span.sides[side]) + begin * shape.sizes[side];
  }
  tile.n = static_cast<uint32_t>(n);
  tile.span = index;
  return tile;
}

template <int S>
FUSED_EMA_HOST_DEVICE inline TileOf<S> block_tile_of(const ShapeOf<S>& shape, const SpanOf<S>& span,
                                                     const Split& split, int64_t index,
                                                     uint32_t span_index) {
  const int64_t block_tile = shape.block_tile();
  return tile_at(shape, span, split.head + index * block_tile, block_tile, span_index);
}

template <int S>
FUSED_EMA_HOST_DEVICE inline TileOf<S> warp_tile_of(const ShapeOf<S>& shape, const SpanOf<S>& span,
                                                    const Split& split, int64_t index,
                                                    uint32_t span_index) {
  if (split.head > 0) {
    if (index == 0) return tile_at(shape, span, 0, split.head, span_index);
    --index;
  }
  const int64_t warp_tile = shape.warp_tile();
  const int64_t begin = split.head + split.num_block_tiles * shape.block_tile() + index * warp_tile;
  const int64_t left = span.n - begin;
  return tile_at(shape, span, begin, left < warp_tile ? left : warp_tile, span_index);
}

// All tiles of a list: block tiles first, then warp tiles.
template <int S>
struct TileTable {
  std::vector<TileOf<S>> tiles;
  int64_t num_block_tiles = 0;
  int64_t num_warp_tiles() const { return static_cast<int64_t>(tiles.size()) - num_block_tiles; }
};

// Of two sides, or of kAveragesSides.
template <int S>
TileTable<S> make_tile_table(const ShapeOf<S>& shape, const std::vector<SpanOf<S>>& spans);

}  // namespace fused_ema
