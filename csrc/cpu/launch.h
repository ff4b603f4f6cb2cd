// Runs a kernel over a list of spans, in parallel over their concatenated elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tiles.h"
#include "kernels.h"

namespace fused_ema::cpu {

// Spans, with the running total of their cost: elements plus a charge a span, so that a range of
// small tensors and a range of one large tensor take a thread equally long.
struct SpanTable {
  std::vector<Span> spans;
  std::vector<int64_t> cost_before;  // one more than spans: the last is the total
  int64_t num_elements = 0;
  // The emas of other averages of the same params: for each span num_others of them.
  std::vector<void*> others;
  int num_others = 0;

  // A param with its ema of that average.
  Span pair(size_t i, int average) const {
    Span pair = spans[i];
    if (average > 0) pair.sides[0] = others[i * num_others + average - 1];
    return pair;
  }
};
SpanTable make_span_table(std::vector<Span> spans, std::vector<void*> others = {},
                          int num_others = 0);

// The instruction set in use: "avx512", "avx2" or "generic".
const char* instruction_set();
// Chooses one of them by name for this process; false where the machine or the build lacks it.
bool set_instruction_set(const char* name);

SpanKernel update_kernel(DtypePair pair, Form form);
SpanKernel one_at_a_time_kernel(DtypePair pair);
SpanKernel swap_kernel(DtypePair pair);
// streaming: past the caches, for destinations larger than those of the cores at work. A constant,
// since a virtual machine may report its host's caches.
constexpr int64_t kStreamingBytes = int64_t{64} << 20;
SpanKernel copy_kernel(DtypePair pair, bool to_a, bool streaming);

// How torch's own loop over one tensor is cut: between threads from more than 32,768 elements on
// (at::internal::GRAIN_SIZE), and each thread's part into steps of two vectors. What is left of a
// part is computed one element at a time, which in bf16 and fp16 gives other bits.
struct TorchLoop {
  int64_t num_threads;
  int64_t step;
};

// One operation on a list: on the averages [first, last), a momentum for each.
struct Work {
  SpanKernel kernel;
  const double* momenta = nullptr;
  int first = 0;
  int last = 1;
  SpanKernel one_at_a_time = nullptr;  // where set, for the elements that torch_loop leaves over
  TorchLoop torch_loop = {1, 1};
};

// What a thread takes at once. Smaller lists take one thread: another takes longer to start (about
// 5 us) than the work. The upper bound leaves a large list enough chunks for a hundred threads.
inline int64_t chunk_cost(int64_t total) {
  return std::clamp(total / 64, int64_t{1} << 14, int64_t{1} << 20);
}

// Costs [begin, end) of the table, on this thread.
void run_range(const SpanTable& table, const TileShape& shape, const Work& work, int64_t begin,
               int64_t end);

}  // namespace fused_ema::cpu
