// Checked lists, grouped by what one launch can serve, and the launch itself. Plans keep groups;
// one-shot calls make them, run them and drop them.
#pragma once

#include <algorithm>
#include <optional>

#include "borrowed.h"
#include "checks.h"
#include "cpu/launch.h"
#include "tiles.h"

namespace fused_ema {

struct Operation {
  enum class Kind { kUpdate, kSwap, kCopyToA, kCopyToB };
  Kind kind;
  Form form = Form::kLerp;
  double momentum = 0.0;
  // A float64 tensor on the device, which the kernel reads when it runs: 0-dim, or of several
  // averages one element for each.
  std::optional<at::Tensor> device_momentum = std::nullopt;
  // Of several averages, a momentum for each.
  std::vector<double> momenta = {};
  // Which of several a swap or a copy is about.
  int average = 0;
};

// All pairs of one device and one dtype pair: one launch. Of several averages a pair's first side
// is one tensor for each, and an update is a launch for every kMostAverages of them.
struct Group {
  at::Device device = at::kCPU;
  DtypePair pair = DtypePair::kFloat32Float32;
  bool flipped = false;   // the lists' first side is the pair's side b
  int64_t num_pairs = 0;  // with the empty ones, which have no span
  cpu::SpanTable spans;
  // The tensors whose version counters a write to the lists' first or second side bumps: one of
  // several neighbours that share a counter. The lists keep them alive.
  std::vector<std::vector<c10::TensorImpl*>> versions_a;  // of each average
  std::vector<c10::TensorImpl*> versions_b;
  // CUDA plans only: the tile tables in device memory, one after the other, and the stream that
  // they were made on.
  struct TableAt {
    int64_t begin = 0;  // in bytes
    int64_t num_block_tiles = 0;
    int64_t num_warp_tiles = 0;
  };
  at::Tensor tables;
  std::vector<TableAt> pair_tables;      // one for each average
  std::vector<TableAt> averages_tables;  // one for each launch over several
  std::optional<c10::Stream> table_stream = std::nullopt;

  int num_averages() const { return spans.num_others + 1; }
};

struct Groups {
  std::vector<Group> groups;
  // Pairs without a kernel; of several averages the first sides one list after the other.
  BorrowedTensors fallback_a;
  BorrowedTensors fallback_b;
  int num_averages = 1;

  // Whether any of the work is done by another device than the CPU.
  bool has_launches() const {
    return std::any_of(groups.begin(), groups.end(),
                       [](const Group& group) { return !group.device.is_cpu(); });
  }
};

// a and checked: of several averages one list after the other.
Groups make_groups(const Signature& signature, const Tensors& a, const Tensors& b,
                   const CheckedPairs& checked, int num_averages = 1);

// Moves the tile tables of CUDA groups into device memory. wait: any stream may use them at once;
// otherwise those that are ordered after the current one.
void upload_tables(Groups& groups, bool wait);

// Raises where the device momentum can't serve the lists; before anything is written.
void check_device_momentum(const char* op, const Groups& groups, const Operation& operation);

void run(Groups& groups, const Operation& operation);

// "cpu", "cuda" or "foreach", and for the last why.
struct Service {
  const char* backend;
  const char* reason;
};
Service service_of(at::Device device);

bool is_capturing(at::Device device);

// Whether at::parallel_for uses threads here: without -fopenmp it is serial and says nothing.
bool runs_parallel();

}  // namespace fused_ema
