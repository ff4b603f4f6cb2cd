// From sizes and addresses to tiles: how a list of tensor pairs is cut into equal work.
//
// A block tile is work for one CUDA block, a warp tile for one warp, so that 10,000 tensors of 64
// elements are 10,000 warps and not 10,000 blocks. A tensor pair is cut, in order of address, into
//
//   [head] one warp tile up to the first aligned element, where there is such a head
//   [full block tiles] aligned and full: the kernel's fast path, no bounds checks
//   [the rest] warp tiles
//
// A pair that fits one warp tile is one, head included. Pure C++: no torch, no CUDA.
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

// One tensor pair: n elements at a and at b.
struct Span {
  void* a;
  void* b;
  int64_t n;
};

// Consecutive elements of one pair. 32 bits count a tile's elements; a tensor's need 64.
struct Tile {
  void* a;
  void* b;
  uint32_t n;
  uint32_t pair;  // its index in the list of spans
};

// Vectors of a tile. How a block's threads walk them is an operation's own affair (cuda/loop.cuh),
// so that one table serves a plan's every operation. 16 KB of side a: with pieces of 4 KB the
// reads of the table cost a swap a quarter of its speed on an H200, with these nothing.
constexpr int kBlockTileVectors = 1024;
constexpr int kWarpTileVectors = 128;

// Elements a thread takes at once, and the tiles that follow. A vector has 16 bytes of side a, the
// wider one, so that neighbouring threads fill whole sectors in every access to either side.
struct TileShape {
  int size_a, size_b;
  int vec;
  FUSED_EMA_HOST_DEVICE constexpr int warp_tile() const { return kWarpTileVectors * vec; }
  FUSED_EMA_HOST_DEVICE constexpr int block_tile() const { return kBlockTileVectors * vec; }
};

FUSED_EMA_HOST_DEVICE constexpr TileShape tile_shape(int size_a, int size_b) {
  return TileShape{size_a, size_b, kVectorBytes / size_a};
}
constexpr TileShape tile_shape(DtypePair pair) {
  return tile_shape(size_of(dtypes_of(pair).a), size_of(dtypes_of(pair).b));
}

// Elements before the first whole vector of a; and of b, where any head aligns both.
FUSED_EMA_HOST_DEVICE constexpr int head_elements(const TileShape& shape, uintptr_t a) {
  const int past = static_cast<int>(a / shape.size_a % shape.vec);
  return (shape.vec - past) % shape.vec;
}

// How many tiles of which kind one pair gives.
struct Split {
  int head;  // 0 where the pair is one warp tile
  int64_t num_block_tiles;
  int64_t num_warp_tiles;
};

FUSED_EMA_HOST_DEVICE inline Split split(const TileShape& shape, const Span& span) {
  const int64_t warp_tile = shape.warp_tile();
  const int64_t block_tile = shape.block_tile();
  if (span.n <= warp_tile) return Split{0, 0, span.n > 0 ? 1 : 0};
  const int head = head_elements(shape, reinterpret_cast<uintptr_t>(span.a));
  const int64_t body = span.n - head;
  const int64_t rest = body % block_tile;
  return Split{head, body / block_tile, (head > 0 ? 1 : 0) + (rest + warp_tile - 1) / warp_tile};
}

FUSED_EMA_HOST_DEVICE inline Tile tile_at(const TileShape& shape, const Span& span, int64_t begin,
                                          int64_t n, uint32_t pair) {
  return Tile{static_cast<char*>(span.a) + begin * shape.size_a,
              static_cast<char*>(span.b) + begin * shape.size_b, static_cast<uint32_t>(n), pair};
}

FUSED_EMA_HOST_DEVICE inline Tile block_tile_of(const TileShape& shape, const Span& span,
                                                const Split& split, int64_t index, uint32_t pair) {
  const int64_t block_tile = shape.block_tile();
  return tile_at(shape, span, split.head + index * block_tile, block_tile, pair);
}

FUSED_EMA_HOST_DEVICE inline Tile warp_tile_of(const TileShape& shape, const Span& span,
                                               const Split& split, int64_t index, uint32_t pair) {
  if (split.head > 0) {
    if (index == 0) return tile_at(shape, span, 0, split.head, pair);
    --index;
  }
  const int64_t warp_tile = shape.warp_tile();
  const int64_t begin = split.head + split.num_block_tiles * shape.block_tile() + index * warp_tile;
  const int64_t left = span.n - begin;
  return tile_at(shape, span, begin, left < warp_tile ? left : warp_tile, pair);
}

// All tiles of a list: block tiles first, then warp tiles.
struct TileTable {
  std::vector<Tile> tiles;
  int64_t num_block_tiles = 0;
  int64_t num_warp_tiles() const { return static_cast<int64_t>(tiles.size()) - num_block_tiles; }
};

TileTable make_tile_table(const TileShape& shape, const std::vector<Span>& spans);

}  // namespace fused_ema
