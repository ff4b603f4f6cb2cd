#include "launch.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fused_ema::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  SpanKernel (*update)(DtypePair, Form);
  SpanKernel (*one_at_a_time)(DtypePair);
  SpanKernel (*swap)(DtypePair);
  SpanKernel (*copy)(DtypePair, bool, bool);
};

constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512::update_kernel, avx512::one_at_a_time_kernel, avx512::swap_kernel, avx512::copy_kernel},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     avx2::update_kernel, avx2::one_at_a_time_kernel, avx2::swap_kernel, avx2::copy_kernel},
#endif
    {"generic", [] { return true; }, generic::update_kernel, generic::one_at_a_time_kernel,
     generic::swap_kernel, generic::copy_kernel},
};

const InstructionSet* best() {
  return std::find_if(std::begin(kInstructionSets), std::end(kInstructionSets),
                      [](const InstructionSet& set) { return set.runs_here(); });
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

// A span costs about as much as this many elements: a call, and misses on its first lines.
constexpr int64_t kSpanCost = 128;

// Spans ahead that are fetched while this one runs, small tensors whole. These are too short for
// the hardware's prefetchers, and into the second-level cache more misses are under way at once.
constexpr size_t kSpansAhead = 12;
constexpr int64_t kPrefetchBytes = 512;

// What is worked on of several averages at once, so that the params come from memory once and then
// from the first-level cache, which holds this much of five sides.
constexpr int64_t kPiece = 512;

void fetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < std::min(bytes, kPrefetchBytes); i += 64) {
    __builtin_prefetch(static_cast<const char*>(begin) + i, 0, 2);
  }
}

void prefetch(const SpanTable& table, size_t i, const TileShape& shape, const Work& work) {
  const Span& span = table.spans[i];
  fetch(span.sides[1], span.n * shape.sizes[1]);
  for (int average = work.first; average < work.last; ++average) {
    fetch(table.pair(i, average).sides[0], span.n * shape.sizes[0]);
  }
}

void run_elements(SpanKernel kernel, double momentum, const Span& span, const TileShape& shape,
                  int64_t begin, int64_t end) {
  kernel(momentum, static_cast<char*>(span.sides[0]) + begin * shape.sizes[0],
         static_cast<char*>(span.sides[1]) + begin * shape.sizes[1], end - begin);
}

// Elements [first, last) of a span, each with the arithmetic that torch's loop would give it.
void run_as_torch(const Work& work, double momentum, const Span& span, const TileShape& shape,
                  int64_t first, int64_t last) {
  constexpr int64_t kTorchGrain = 32768;
  const TorchLoop& loop = work.torch_loop;
  int64_t part = span.n;
  if (span.n > kTorchGrain && loop.num_threads > 1) {
    const int64_t grains = (span.n + kTorchGrain - 1) / kTorchGrain;
    const int64_t num_parts = std::min(loop.num_threads, grains);
    part = (span.n + num_parts - 1) / num_parts;
  }
  const auto run = [&](SpanKernel kernel, int64_t begin, int64_t end) {
    begin = std::max(begin, first);
    end = std::min(end, last);
    if (begin >= end) return;
    run_elements(kernel, momentum, span, shape, begin, end);
  };
  for (int64_t begin = first / part * part; begin < last; begin += part) {
    const int64_t end = std::min(begin + part, span.n);
    const int64_t in_vectors = begin + (end - begin) / loop.step * loop.step;
    run(work.kernel, begin, in_vectors);
    run(work.one_at_a_time, in_vectors, end);
  }
}

// Elements [first, last) of a span, of one average.
void run_average(const Work& work, int average, const Span& span, const TileShape& shape,
                 int64_t first, int64_t last) {
  const double momentum = work.momenta == nullptr ? 0.0 : work.momenta[average];
  if (work.one_at_a_time != nullptr) {
    run_as_torch(work, momentum, span, shape, first, last);
  } else {
    run_elements(work.kernel, momentum, span, shape, first, last);
  }
}

}  // namespace

SpanTable make_span_table(std::vector<Span> spans, std::vector<void*> others, int num_others) {
  SpanTable table;
  table.spans = std::move(spans);
  table.others = std::move(others);
  table.num_others = num_others;
  table.cost_before.reserve(table.spans.size() + 1);
  int64_t total = 0;
  for (const Span& span : table.spans) {
    table.cost_before.push_back(total);
    total += span.n + kSpanCost;
    table.num_elements += span.n;
  }
  table.cost_before.push_back(total);
  return table;
}

const char* instruction_set() { return chosen().load()->name; }

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) {
      chosen() = &set;
      return true;
    }
  }
  return false;
}

SpanKernel update_kernel(DtypePair pair, Form form) { return chosen().load()->update(pair, form); }
SpanKernel one_at_a_time_kernel(DtypePair pair) { return chosen().load()->one_at_a_time(pair); }
SpanKernel swap_kernel(DtypePair pair) { return chosen().load()->swap(pair); }
SpanKernel copy_kernel(DtypePair pair, bool to_a, bool streaming) {
  return chosen().load()->copy(pair, to_a, streaming);
}

void run_range(const SpanTable& table, const TileShape& shape, const Work& work, int64_t begin,
               int64_t end) {
  const auto& before = table.cost_before;
  size_t i = std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1;
  for (; i < table.spans.size() && before[i] < end; ++i) {
    const Span& span = table.spans[i];
    if (i + kSpansAhead < table.spans.size()) prefetch(table, i + kSpansAhead, shape, work);
    // A span shared by two ranges is cut by cost, at a multiple of 64 elements so that no two
    // threads write one cache line's worth of vectors. Both sides compute the same cut.
    const auto cut = [&](int64_t cost) {
      const int64_t element = cost - before[i];
      return element >= span.n ? span.n : std::max<int64_t>(element, 0) / 64 * 64;
    };
    const int64_t first = cut(begin);
    const int64_t last = cut(end);
    if (first >= last) continue;
    const int64_t piece = work.last - work.first == 1 ? last - first : kPiece;
    for (int64_t piece_first = first; piece_first < last; piece_first += piece) {
      const int64_t piece_last = std::min(piece_first + piece, last);
      for (int average = work.first; average < work.last; ++average) {
        run_average(work, average, table.pair(i, average), shape, piece_first, piece_last);
      }
    }
  }
}

}  // namespace fused_ema::cpu
