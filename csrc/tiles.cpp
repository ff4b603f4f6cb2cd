#include "tiles.h"

#include <cstddef>

namespace fused_ema {

template <int S>
TileTable<S> make_tile_table(const ShapeOf<S>& shape, const std::vector<SpanOf<S>>& spans) {
  TileTable<S> table;
  int64_t num_warp_tiles = 0;
  for (const SpanOf<S>& span : spans) {
    const Split parts = split(shape, span);
    table.num_block_tiles += parts.num_block_tiles;
    num_warp_tiles += parts.num_warp_tiles;
  }
  table.tiles.resize(table.num_block_tiles + num_warp_tiles);
  TileOf<S>* next_block_tile = table.tiles.data();
  TileOf<S>* next_warp_tile = table.tiles.data() + table.num_block_tiles;
  for (size_t i = 0; i < spans.size(); ++i) {
    const SpanOf<S>& span = spans[i];
    const Split parts = split(shape, span);
    const uint32_t index = static_cast<uint32_t>(i);
    for (int64_t tile = 0; tile < parts.num_block_tiles; ++tile) {
      *next_block_tile++ = block_tile_of(shape, span, parts, tile, index);
    }
    for (int64_t tile = 0; tile < parts.num_warp_tiles; ++tile) {
      *next_warp_tile++ = warp_tile_of(shape, span, parts, tile, index);
    }
  }
  return table;
}

template TileTable<2> make_tile_table(const ShapeOf<2>&, const std::vector<SpanOf<2>>&);
template TileTable<kAveragesSides> make_tile_table(const ShapeOf<kAveragesSides>&,
                                                   const std::vector<SpanOf<kAveragesSides>>&);

}  // namespace fused_ema
