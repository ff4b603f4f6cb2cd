// What the host may ask of the CUDA kernels. Includes no CUDA header.
#pragma once

#include <cstdint>

#include "../dtype_pairs.h"
#include "../ema_math.h"
#include "../tiles.h"

namespace fused_ema::cuda {

// A cudaError_t; 0 is success.
using Status = int;
const char* status_text(Status status);

// A cudaStream_t.
using Stream = void*;

// Either a plan's table in device memory (one launch), or spans in host memory that travel as
// kernel arguments (one launch per kMaxSpansPerLaunch of them).
template <int S>
struct WorkOf {
  const TileOf<S>* tiles = nullptr;
  uint32_t num_block_tiles = 0;
  uint32_t num_warp_tiles = 0;
  const SpanOf<S>* spans = nullptr;
  int64_t num_spans = 0;
};
using Work = WorkOf<2>;
using AveragesWork = WorkOf<kAveragesSides>;

// By value, or read by the kernel from device memory where the pointer is set.
struct Momentum {
  double value;
  const double* device = nullptr;
};

// Of two to kMostAverages averages: by value, or as many read from device memory.
struct Momenta {
  int count;
  const double* values;
  const double* device = nullptr;
};

Status launch_update(DtypePair pair, Form form, const Work& work, Momentum momentum, Stream stream);
// Several averages of the same params, which are read once.
Status launch_update_averages(DtypePair pair, Form form, const AveragesWork& work, Momenta momenta,
                              Stream stream);
Status launch_swap(DtypePair pair, const Work& work, Stream stream);
// From side b to side a of the pair, or the other way.
Status launch_copy(DtypePair pair, bool to_a, const Work& work, Stream stream);

bool is_capturing(Stream stream);
// Calls release(object) when the graph that the stream is being captured into, and all that is made
// from that, are gone; or at once where this fails. Maybe on a thread that must not call CUDA.
Status keep_with_graph(Stream stream, void* object, void (*release)(void*));
// Whether the kernels in this build run on that device.
bool serves_device(int device);
// "80 90 100": the architectures of this build.
const char* built_architectures();

}  // namespace fused_ema::cuda
