// The CUDA kernels as plain C functions, for callers without torch: bench/gpu/c_kernels.py calls
// them. No part of the module.
#include <algorithm>

#include "launch.h"

using namespace fused_ema;

namespace {

template <int S>
void make_tiles(const ShapeOf<S>& shape, const SpanOf<S>* spans, int64_t num_spans,
                int64_t counts[2], TileOf<S>* tiles) {
  const TileTable<S> table =
      make_tile_table(shape, std::vector<SpanOf<S>>(spans, spans + num_spans));
  counts[0] = table.num_block_tiles;
  counts[1] = table.num_warp_tiles();
  if (tiles != nullptr) std::copy(table.tiles.begin(), table.tiles.end(), tiles);
}

}  // namespace

extern "C" {

// These tell how many block tiles and warp tiles a list gives, and write them where tiles is not
// null. Of pairs, and of several averages with their params.
void ema_make_tiles(int pair, const Span* spans, int64_t num_spans, int64_t counts[2],
                    Tile* tiles) {
  make_tiles(tile_shape(static_cast<DtypePair>(pair)), spans, num_spans, counts, tiles);
}
void ema_make_averages_tiles(int pair, const SpanOf<kAveragesSides>* spans, int64_t num_spans,
                             int64_t counts[2], TileOf<kAveragesSides>* tiles) {
  make_tiles(averages_shape(static_cast<DtypePair>(pair)), spans, num_spans, counts, tiles);
}

// These return a cudaError_t. Where device_momentum is not null, the momentum is read from there.
int ema_update(int pair, int form, double momentum, const double* device_momentum,
               const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_update(static_cast<DtypePair>(pair), static_cast<Form>(form), *work,
                             {momentum, device_momentum}, stream);
}

int ema_update_averages(int pair, int form, int count, const double* momenta,
                        const double* device_momenta, const cuda::AveragesWork* work,
                        cuda::Stream stream) {
  return cuda::launch_update_averages(static_cast<DtypePair>(pair), static_cast<Form>(form), *work,
                                      {count, momenta, device_momenta}, stream);
}

int ema_swap(int pair, const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_swap(static_cast<DtypePair>(pair), *work, stream);
}

int ema_copy(int pair, int to_a, const cuda::Work* work, cuda::Stream stream) {
  return cuda::launch_copy(static_cast<DtypePair>(pair), to_a != 0, *work, stream);
}

}  // extern "C"
