// Every CPU kernel, and the CUDA kernels' own code, on memory of exactly the size they may touch,
// to be run under a sanitizer. All of them must also agree bit for bit.
//
//   sanitize            everything; prints how many elements, exit status 0
//   sanitize overrun    one element too many, which AddressSanitizer must see
//   sanitize shift      a shift by too much, which UndefinedBehaviorSanitizer must see
//   sanitize race       two threads on one chunk, which ThreadSanitizer must see
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "../../csrc/cpu/launch.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/parallel.h"
#include "cuda_runtime.h"

using namespace fused_ema;

namespace {

// Around each vector, warp tile and block tile, and each loop's unrolling.
constexpr int64_t kSizes[] = {0,    1,    2,    3,    7,    8,    9,    15,    16,   17,  31,
                              33,   63,   64,   65,   127,  129,  255,  257,   511,  513, 1023,
                              1025, 2047, 2049, 4095, 4097, 8191, 8193, 12345, 33000};
constexpr int kOffsets[][2] = {{0, 0}, {1, 1}, {3, 0}, {0, 1}, {5, 2}};

enum class Kind { kUpdate, kSwap, kCopyToA, kCopyToB };
struct Operation {
  Kind kind;
  Form form;
  double momentum;
};
// A quarter is exact in every dtype, so that it doesn't matter who rounds alpha to which.
constexpr Operation kOperations[] = {
    {Kind::kUpdate, Form::kLerp, 0.25},   {Kind::kUpdate, Form::kLerp, 0.75},
    {Kind::kUpdate, Form::kMulAdd, 0.25}, {Kind::kSwap, Form::kLerp, 0},
    {Kind::kCopyToA, Form::kLerp, 0},     {Kind::kCopyToB, Form::kLerp, 0}};

// The elements of one side, at the very end of an allocation.
struct Side {
  std::vector<char*> allocations;
  std::vector<void*> elements;
  std::vector<int64_t> bytes;

  Side(int size, int offset, uint32_t seed) {
    for (int64_t n : kSizes) {
      bytes.push_back(n * size);
      allocations.push_back(static_cast<char*>(std::malloc(offset * size + n * size)));
      elements.push_back(allocations.back() + offset * size);
      auto* words = static_cast<unsigned char*>(elements.back());
      for (int64_t i = 0; i < n * size; ++i) {
        seed = seed * 1664525u + 1013904223u;
        words[i] = static_cast<unsigned char>(seed >> 24);
        // Finite: the upper bit of an element's exponent is 0.
        if (i % size == size - 1) words[i] &= 0xbf;
      }
    }
  }
  Side(const Side&) = delete;
  ~Side() {
    for (char* allocation : allocations) std::free(allocation);
  }
  bool operator==(const Side& other) const {
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (bytes[i] > 0 && std::memcmp(elements[i], other.elements[i], bytes[i]) != 0) return false;
    }
    return true;
  }
};

std::vector<Span> spans_of(const Side& a, const Side& b) {
  std::vector<Span> spans;
  for (size_t i = 0; i < std::size(kSizes); ++i) {
    spans.push_back(Span{a.elements[i], b.elements[i], kSizes[i]});
  }
  return spans;
}

void run_cpu(DtypePair pair, const Operation& operation, std::vector<Span> spans, bool streaming) {
  cpu::Work work{nullptr, operation.momentum};
  switch (operation.kind) {
    case Kind::kUpdate:
      work.kernel = cpu::update_kernel(pair, operation.form);
      break;
    case Kind::kSwap:
      work.kernel = cpu::swap_kernel(pair);
      break;
    default:
      work.kernel = cpu::copy_kernel(pair, operation.kind == Kind::kCopyToA, streaming);
  }
  const cpu::SpanTable table = cpu::make_span_table(std::move(spans));
  const int64_t total = table.cost_before.back();
  // As groups.cpp does, but in smaller chunks: more seams between threads.
  parallel_chunks(total, 1 << 10, [&](int64_t begin, int64_t end) {
    cpu::run_range(table, tile_shape(pair), work, begin, end);
  });
}

void run_cuda(DtypePair pair, const Operation& operation, const std::vector<Span>& spans,
              bool by_table) {
  cuda::Work work;
  TileTable table;
  if (by_table) {
    table = make_tile_table(tile_shape(pair), spans);
    work.tiles = table.tiles.data();
    work.num_block_tiles = static_cast<uint32_t>(table.num_block_tiles);
    work.num_warp_tiles = static_cast<uint32_t>(table.num_warp_tiles());
  } else {
    work.spans = spans.data();
    work.num_spans = static_cast<int64_t>(spans.size());
  }
  cuda::Status status = 0;
  switch (operation.kind) {
    case Kind::kUpdate:
      status = cuda::launch_update(pair, operation.form, work, {operation.momentum}, nullptr);
      break;
    case Kind::kSwap:
      status = cuda::launch_swap(pair, work, nullptr);
      break;
    default:
      status = cuda::launch_copy(pair, operation.kind == Kind::kCopyToA, work, nullptr);
  }
  if (status != cudaSuccess) {
    std::printf("launch failed: %d\n", status);
    std::exit(1);
  }
}

using Run = std::function<void(DtypePair, const Operation&, const std::vector<Span>&)>;

std::vector<std::pair<std::string, Run>> all_ways() {
  std::vector<std::pair<std::string, Run>> ways;
  for (const char* name : {"generic", "avx2", "avx512"}) {
    if (!cpu::set_instruction_set(name)) continue;
    for (bool streaming : {false, true}) {
      ways.emplace_back(std::string(name) + (streaming ? ", streaming" : ""),
                        [=](DtypePair pair, const Operation& operation, const auto& spans) {
                          cpu::set_instruction_set(name);
                          run_cpu(pair, operation, spans, streaming);
                        });
    }
  }
  for (bool by_table : {true, false}) {
    ways.emplace_back(by_table ? "CUDA table" : "CUDA arguments",
                      [=](DtypePair pair, const Operation& operation, const auto& spans) {
                        run_cuda(pair, operation, spans, by_table);
                      });
  }
  return ways;
}

int run_all() {
  const auto ways = all_ways();
  int64_t num_elements = 0;
  for (int p = 0; p < kNumDtypePairs; ++p) {
    const auto pair = static_cast<DtypePair>(p);
    const int size_a = size_of(dtypes_of(pair).a);
    const int size_b = size_of(dtypes_of(pair).b);
    for (const auto& offsets : kOffsets) {
      for (const Operation& operation : kOperations) {
        const auto run = [&](const Run& way, Side& a, Side& b) {
          way(pair, operation, spans_of(a, b));
          for (int64_t n : kSizes) num_elements += n;
        };
        Side a(size_a, offsets[0], 1), b(size_b, offsets[1], 2);
        run(ways.front().second, a, b);
        for (size_t i = 1; i < ways.size(); ++i) {
          Side other_a(size_a, offsets[0], 1), other_b(size_b, offsets[1], 2);
          run(ways[i].second, other_a, other_b);
          if (!(a == other_a) || !(b == other_b)) {
            std::printf("%s and %s differ: pair %d, operation %d, form %d, offsets %d and %d\n",
                        ways.front().first.c_str(), ways[i].first.c_str(), p,
                        static_cast<int>(operation.kind), static_cast<int>(operation.form),
                        offsets[0], offsets[1]);
            return 1;
          }
        }
      }
    }
  }
  std::printf("%zu ways, %lld elements\n", ways.size(), static_cast<long long>(num_elements));
  return 0;
}

// ---- What the sanitizers must see.

int overrun() {
  Side a(4, 0, 1), b(4, 0, 2);
  std::vector<Span> spans = spans_of(a, b);
  ++spans[20].n;
  run_cuda(DtypePair::kFloat32Float32, kOperations[0], spans, true);
  return 0;
}

int shift(int by) {
  std::printf("%d\n", 1 << by);
  return 0;
}

int race() {
  std::vector<float> a(4096), b(4096);
  cpu::Work work{cpu::swap_kernel(DtypePair::kFloat32Float32)};
  const cpu::SpanTable table = cpu::make_span_table({Span{a.data(), b.data(), 4096}});
  const TileShape shape = tile_shape(DtypePair::kFloat32Float32);
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) { cpu::run_range(table, shape, work, 0, 4096); });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "overrun") return overrun();
  if (what == "shift") return shift(argc + 40);
  if (what == "race") return race();
  return run_all();
}
