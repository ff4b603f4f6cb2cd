// The CUDA kernels as plain C functions, for callers without torch: bench/gpu/c_kernels.py calls
// them. No part of the module.
#include <algorithm>

#include "launch.h"

using namespace fused_ema;

extern "C" {

// Tells how many block tiles and warp tiles a list gives, and writes them where tiles is not null.
void ema_make_tiles(int pair, const Span* spans, int64_t num_spans, int64_t counts[2],
                    Tile* tiles) {
  const TileTable table = make_tile_table(tile_shape(static_cast<DtypePair>(pair)),
                                          std::vector<Span>(spans, spans + num_spans));
  counts[0] = table.num_block_tiles;
  counts[1] = table.num_warp_tiles();
  if (tiles != nullptr) std::copy(table.tiles.begin(), table.tiles.end(), tiles);
}

// These return a cudaError_t. Where device_momentum is not null, the momentum is read from there.
int ema_update(int pair, int form, double momentum, const double* device_momentum,
               const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_update(static_cast<DtypePair>(pair), static_cast<Form>(form), *work,
                             {momentum, device_momentum}, stream);
}

int ema_swap(int pair, const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_swap(static_cast<DtypePair>(pair), *work, stream);
}

int ema_copy(int pair, int to_a, const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_copy(static_cast<DtypePair>(pair), to_a != 0, *work, stream);
}

}  // extern "C"
