#include "tiles.h"

#include <cstddef>

namespace fused_ema {

TileTable make_tile_table(const TileShape& shape, const std::vector<Span>& spans) {
  TileTable table;
  int64_t num_warp_tiles = 0;
  for (const Span& span : spans) {
    const Split parts = split(shape, span);
    table.num_block_tiles += parts.num_block_tiles;
    num_warp_tiles += parts.num_warp_tiles;
  }
  table.tiles.resize(table.num_block_tiles + num_warp_tiles);
  Tile* next_block_tile = table.tiles.data();
  Tile* next_warp_tile = table.tiles.data() + table.num_block_tiles;
  for (size_t pair = 0; pair < spans.size(); ++pair) {
    const Span& span = spans[pair];
    const Split parts = split(shape, span);
    const uint32_t index = static_cast<uint32_t>(pair);
    for (int64_t i = 0; i < parts.num_block_tiles; ++i) {
      *next_block_tile++ = block_tile_of(shape, span, parts, i, index);
    }
    for (int64_t i = 0; i < parts.num_warp_tiles; ++i) {
      *next_warp_tile++ = warp_tile_of(shape, span, parts, i, index);
    }
  }
  return table;
}

}  // namespace fused_ema
