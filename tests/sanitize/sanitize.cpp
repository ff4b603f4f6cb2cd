// Every CPU kernel, and every CUDA kernel on memory of exactly the size that it may touch, to be
// run under a sanitizer. All of them must also agree bit for bit. Compiled by g++ with tests/host/
// the CUDA kernels' code runs on the processor; compiled by nvcc it runs on a GPU.
//
//   sanitize            everything; prints how many elements, exit status 0
//   sanitize FAULT      a planted fault that a sanitizer must see: main() has their names
#include <ATen/Parallel.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

#include "../../csrc/cpu/launch.h"
#include "../../csrc/cpu/weighted_sum.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/weighted_sum.h"
#include "../../csrc/parallel.h"

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
    {Kind::kUpdate, Form::kMulAdd, 0.25}, {Kind::kUpdate, Form::kTwoProducts, 0.3},
    {Kind::kSwap, Form::kLerp, 0},        {Kind::kCopyToA, Form::kLerp, 0},
    {Kind::kCopyToB, Form::kLerp, 0}};

void check(int status) {
  if (status == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

// The elements of one side, at the very end of an allocation.
struct Side {
  int size;    // bytes of an element
  int offset;  // elements from the start of an allocation to the first
  std::vector<char*> allocations;

  Side(int size, int offset, uint32_t seed) : size(size), offset(offset) {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      allocations.push_back(static_cast<char*>(std::malloc(offset * size + bytes(i))));
      auto* values = reinterpret_cast<unsigned char*>(elements(i));
      for (int64_t j = 0; j < bytes(i); ++j) {
        seed = seed * 1664525u + 1013904223u;
        values[j] = static_cast<unsigned char>(seed >> 24);
        // Finite: the upper bit of an element's exponent is 0.
        if (j % size == size - 1) values[j] &= 0xbf;
      }
    }
  }
  Side(const Side&) = delete;
  ~Side() {
    for (char* allocation : allocations) std::free(allocation);
  }
  int64_t bytes(size_t i) const { return kSizes[i] * size; }
  char* elements(size_t i) const { return allocations[i] + offset * size; }
  bool operator==(const Side& other) const {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      if (bytes(i) > 0 && std::memcmp(elements(i), other.elements(i), bytes(i)) != 0) return false;
    }
    return true;
  }
};

// The same in the device's memory, where nothing before the first element is ever written.
struct DeviceSide {
  Side& host;
  std::vector<void*> allocations;

  explicit DeviceSide(Side& host, int left_unwritten = -1) : host(host) {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      check(cudaMalloc(&allocations.emplace_back(), host.offset * host.size + host.bytes(i)));
      if (static_cast<int>(i) == left_unwritten) continue;
      check(cudaMemcpy(elements(i), host.elements(i), host.bytes(i), cudaMemcpyHostToDevice));
    }
  }
  DeviceSide(const DeviceSide&) = delete;
  ~DeviceSide() {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      check(cudaMemcpy(host.elements(i), elements(i), host.bytes(i), cudaMemcpyDeviceToHost));
      check(cudaFree(allocations[i]));
    }
  }
  char* elements(size_t i) const {
    return static_cast<char*>(allocations[i]) + host.offset * host.size;
  }
};

template <typename AnySide>
std::vector<Span> spans_of(const AnySide& a, const AnySide& b) {
  std::vector<Span> spans;
  for (size_t i = 0; i < std::size(kSizes); ++i) {
    spans.push_back(Span{{a.elements(i), b.elements(i)}, kSizes[i]});
  }
  return spans;
}

// A momentum for each average; exact in every dtype, as a quarter is.
constexpr double kMomenta[] = {0.25, 0.5, 0.125, 0.75};

// As groups.cpp does, but in smaller chunks: more seams between threads.
void run_in_chunks(DtypePair pair, const cpu::SpanTable& table, const cpu::Work& work) {
  parallel_chunks(Threads::kAll, table.cost_before.back(), 1 << 10,
                  [&](int64_t begin, int64_t end) {
                    cpu::run_range(table, tile_shape(pair), work, begin, end);
                  });
}

void run_cpu(DtypePair pair, const Operation& operation, const Side& a, const Side& b,
             bool streaming) {
  cpu::Work work{nullptr, &operation.momentum};
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
  run_in_chunks(pair, cpu::make_span_table(spans_of(a, b)), work);
}

void run_averages_on_cpu(DtypePair pair, Form form, const std::vector<const Side*>& emas,
                         const Side& b) {
  const int count = static_cast<int>(emas.size());
  std::vector<void*> others;
  for (size_t i = 0; i < std::size(kSizes); ++i) {
    for (int k = 1; k < count; ++k) others.push_back(emas[k]->elements(i));
  }
  const cpu::Work work{cpu::update_kernel(pair, form), kMomenta, 0, count};
  run_in_chunks(pair, cpu::make_span_table(spans_of(*emas[0], b), std::move(others), count - 1),
                work);
}

// Values of the host in the device's memory.
template <typename T>
class Uploaded {
 public:
  Uploaded(const T* values, size_t count) {
    check(cudaMalloc(&memory_, count * sizeof(T)));
    check(cudaMemcpy(memory_, values, count * sizeof(T), cudaMemcpyHostToDevice));
  }
  Uploaded(const Uploaded&) = delete;
  ~Uploaded() { check(cudaFree(memory_)); }
  const T* get() const { return static_cast<const T*>(memory_); }

 private:
  void* memory_ = nullptr;
};

// A list as a plan has it, or as it travels in the kernel's arguments.
template <int S>
class Listed {
 public:
  Listed(const ShapeOf<S>& shape, const std::vector<SpanOf<S>>& spans, bool by_table)
      : table_(make_tile_table(shape, spans)), tiles_(table_.tiles.data(), table_.tiles.size()) {
    if (by_table) {
      work.tiles = tiles_.get();
      work.num_block_tiles = static_cast<uint32_t>(table_.num_block_tiles);
      work.num_warp_tiles = static_cast<uint32_t>(table_.num_warp_tiles());
    } else {
      work.spans = spans.data();
      work.num_spans = static_cast<int64_t>(spans.size());
    }
  }
  cuda::WorkOf<S> work;

 private:
  const TileTable<S> table_;
  const Uploaded<TileOf<S>> tiles_;
};

// by_table: as a plan runs, and the momentum in the device's memory too; otherwise both travel as
// kernel arguments.
void run_spans(DtypePair pair, const Operation& operation, const std::vector<Span>& spans,
               bool by_table) {
  const Listed<2> listed(tile_shape(pair), spans, by_table);
  const cuda::Work& work = listed.work;
  const Uploaded<double> momentum_there(&operation.momentum, 1);
  cuda::Momentum momentum{operation.momentum};
  if (by_table) momentum = {-1.0, momentum_there.get()};
  switch (operation.kind) {
    case Kind::kUpdate:
      check(cuda::launch_update(pair, operation.form, work, momentum, nullptr));
      break;
    case Kind::kSwap:
      check(cuda::launch_swap(pair, work, nullptr));
      break;
    default:
      check(cuda::launch_copy(pair, operation.kind == Kind::kCopyToA, work, nullptr));
  }
  check(cudaDeviceSynchronize());
}

void run_cuda(DtypePair pair, const Operation& operation, Side& a, Side& b, bool by_table) {
  const DeviceSide device_a(a), device_b(b);
  run_spans(pair, operation, spans_of(device_a, device_b), by_table);
}

void run_averages_on_cuda(DtypePair pair, Form form, const std::vector<Side*>& emas, Side& b,
                          bool by_table) {
  const int count = static_cast<int>(emas.size());
  std::vector<std::unique_ptr<DeviceSide>> device_emas;
  for (Side* ema : emas) device_emas.push_back(std::make_unique<DeviceSide>(*ema));
  const DeviceSide device_b(b);
  std::vector<SpanOf<kAveragesSides>> spans(std::size(kSizes));
  for (size_t i = 0; i < spans.size(); ++i) {
    for (int k = 0; k < kMostAverages; ++k) {
      spans[i].sides[k] = device_emas[k < count ? k : 0]->elements(i);
    }
    spans[i].sides[kMostAverages] = device_b.elements(i);
    spans[i].n = kSizes[i];
  }
  const Listed<kAveragesSides> listed(averages_shape(pair), spans, by_table);
  const Uploaded<double> momenta_there(kMomenta, count);
  cuda::Momenta momenta{count, kMomenta};
  if (by_table) momenta = {count, nullptr, momenta_there.get()};
  check(cuda::launch_update_averages(pair, form, listed.work, momenta, nullptr));
  check(cudaDeviceSynchronize());
}

using Run = std::function<void(DtypePair, const Operation&, Side& a, Side& b)>;

std::vector<std::pair<std::string, Run>> all_ways() {
  std::vector<std::pair<std::string, Run>> ways;
  for (const char* name : {"generic", "avx2", "avx512"}) {
    if (!cpu::set_instruction_set(name)) continue;
    for (bool streaming : {false, true}) {
      ways.emplace_back(std::string(name) + (streaming ? ", streaming" : ""),
                        [=](DtypePair pair, const Operation& operation, Side& a, Side& b) {
                          cpu::set_instruction_set(name);
                          set_sharing(streaming ? "helpers" : "torch");
                          run_cpu(pair, operation, a, b, streaming);
                        });
    }
  }
  for (bool by_table : {true, false}) {
    ways.emplace_back(by_table ? "CUDA table" : "CUDA arguments",
                      [=](DtypePair pair, const Operation& operation, Side& a, Side& b) {
                        run_cuda(pair, operation, a, b, by_table);
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
          way(pair, operation, a, b);
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

// Several averages by each way, against one after the other.
int run_averages() {
  int64_t num_elements = 0;
  for (int p = 0; p < kNumDtypePairs; ++p) {
    const auto pair = static_cast<DtypePair>(p);
    const int size_a = size_of(dtypes_of(pair).a);
    const int size_b = size_of(dtypes_of(pair).b);
    for (const auto& offsets : kOffsets) {
      for (Form form : {Form::kLerp, Form::kMulAdd, Form::kTwoProducts}) {
        for (int count = 2; count <= kMostAverages; ++count) {
          // Where the first has no offset the others lie as it does, as a manager's do.
          const auto make = [&](int k) {
            return std::make_unique<Side>(size_a, offsets[0] + (offsets[0] > 0 ? k : 0), k + 1);
          };
          Side b(size_b, offsets[1], 9);
          std::vector<std::unique_ptr<Side>> wanted;
          for (int k = 0; k < count; ++k) {
            wanted.push_back(make(k));
            run_cpu(pair, {Kind::kUpdate, form, kMomenta[k]}, *wanted[k], b, false);
          }
          for (const char* way : {"generic", "avx2", "avx512", "table", "arguments"}) {
            const std::string name = way;
            const bool on_cuda = name == "table" || name == "arguments";
            if (!on_cuda && !cpu::set_instruction_set(way)) continue;
            std::vector<std::unique_ptr<Side>> emas;
            for (int k = 0; k < count; ++k) emas.push_back(make(k));
            if (on_cuda) {
              std::vector<Side*> sides;
              for (const auto& ema : emas) sides.push_back(ema.get());
              run_averages_on_cuda(pair, form, sides, b, name == "table");
            } else {
              std::vector<const Side*> sides;
              for (const auto& ema : emas) sides.push_back(ema.get());
              run_averages_on_cpu(pair, form, sides, b);
            }
            for (int k = 0; k < count; ++k) {
              for (int64_t n : kSizes) num_elements += n;
              if (*wanted[k] == *emas[k]) continue;
              std::printf("average %d of %d differs by %s: pair %d, form %d, offsets %d and %d\n",
                          k, count, way, p, static_cast<int>(form), offsets[0], offsets[1]);
              return 1;
            }
          }
        }
      }
    }
  }
  std::printf("%lld elements of several averages\n", static_cast<long long>(num_elements));
  return 0;
}

// The weighted sum, of inputs that each end where their allocation does.
int run_sums(Dtype out_dtype, Dtype dtype) {
  constexpr int kNum = 11;  // more than go side by side
  std::vector<Side*> inputs;
  for (int k = 0; k < kNum; ++k) inputs.push_back(new Side(size_of(dtype), k % 3, 10 + k));
  const auto sum_of = [&](void* out, size_t i, const auto& address) {
    WeightedSum sum{out, kSizes[i], kNum, {}, {}};
    for (int k = 0; k < kNum; ++k) {
      sum.inputs[k] = address(k);
      sum.weights[k] = 0.3 * k - 1.0;
    }
    return sum;
  };
  Side expected(size_of(out_dtype), 1, 1);
  bool is_first = true;
  int status = 0;
  for (const char* name : {"generic", "avx2", "avx512", "CUDA"}) {
    const bool on_device = std::strcmp(name, "CUDA") == 0;
    if (!on_device && !cpu::set_instruction_set(name)) continue;
    Side found(size_of(out_dtype), 1, 1);
    if (on_device) {
      const DeviceSide out(found);
      std::vector<DeviceSide*> there;
      for (Side* input : inputs) there.push_back(new DeviceSide(*input));
      for (size_t i = 0; i < std::size(kSizes); ++i) {
        const auto sum = sum_of(out.elements(i), i, [&](int k) { return there[k]->elements(i); });
        check(cuda::launch_weighted_sum(out_dtype, dtype, sum, nullptr));
      }
      check(cudaDeviceSynchronize());
      for (DeviceSide* side : there) delete side;
    } else {
      for (size_t i = 0; i < std::size(kSizes); ++i) {
        const auto sum =
            sum_of(found.elements(i), i, [&](int k) { return inputs[k]->elements(i); });
        const cpu::SumKernel kernel = cpu::sum_kernel(out_dtype, dtype);
        parallel_chunks(Threads::kAll, sum.n, 1 << 10,
                        [&](int64_t begin, int64_t end) { kernel(sum, begin, end); });
      }
    }
    Side& wanted = is_first ? found : expected;
    if (!(found == wanted)) {
      std::printf("weighted sums of %s differ: dtypes %d and %d\n", name,
                  static_cast<int>(out_dtype), static_cast<int>(dtype));
      status = 1;
    }
    if (is_first) {
      for (size_t i = 0; i < std::size(kSizes); ++i) {
        if (found.bytes(i) > 0) {
          std::memcpy(expected.elements(i), found.elements(i), found.bytes(i));
        }
      }
    }
    is_first = false;
  }
  for (Side* input : inputs) delete input;
  return status;
}

int run_all_sums() {
  int status = 0;
#define FUSED_EMA_CASE(Out, In) status |= run_sums(DtypeOf<Out>::value, DtypeOf<In>::value);
  FUSED_EMA_FOR_EACH_SUM(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  return status;
}

// Several callers at once, jobs so short that helpers come late for them, and chunks that throw.
int run_threads() {
  std::atomic<int> num_wrong{0};
  const auto call = [&](int caller) {
    for (int64_t job = 0; job < 3000; ++job) {
      const int64_t size = 2 + (job + caller) % 40;
      const int64_t throws_at = job % 7 == 0 ? size / 2 : -1;
      std::vector<int64_t> values(size, 0);
      bool has_thrown = false;
      try {
        parallel_chunks(Threads::kAll, size, 1, [&](int64_t begin, int64_t) {
          if (begin == throws_at) throw std::runtime_error("a chunk");
          values[begin] += begin + 1;
        });
      } catch (const std::runtime_error&) {
        has_thrown = true;
      }
      const int64_t sum = std::accumulate(values.begin(), values.end(), int64_t{0});
      if (has_thrown != (throws_at >= 0)) ++num_wrong;
      if (!has_thrown && sum != size * (size + 1) / 2) ++num_wrong;
    }
  };
  for (const char* way : {"helpers", "auto"}) {
    set_sharing(way);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) callers.emplace_back(call, caller);
    for (std::thread& caller : callers) caller.join();
  }
  if (num_wrong > 0) std::printf("%d jobs of several threads are wrong\n", num_wrong.load());
  return num_wrong > 0;
}

// ---- Planted faults.

constexpr int kPlantedAt = 20;  // an index into kSizes

int overrun() {
  Side a(4, 0, 1), b(4, 0, 2);
  const DeviceSide device_a(a), device_b(b);
  std::vector<Span> spans = spans_of(device_a, device_b);
  ++spans[kPlantedAt].n;
  run_spans(DtypePair::kFloat32Float32, kOperations[0], spans, true);
  return 0;
}

int shift(int by) {
  std::printf("%d\n", 1 << by);
  return 0;
}

int race() {
  std::vector<float> a(4096), b(4096);
  cpu::Work work{cpu::swap_kernel(DtypePair::kFloat32Float32)};
  const cpu::SpanTable table = cpu::make_span_table({Span{{a.data(), b.data()}, 4096}});
  const TileShape shape = tile_shape(DtypePair::kFloat32Float32);
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) { cpu::run_range(table, shape, work, 0, 4096); });
  return 0;
}

#ifdef __CUDACC__

int unwritten() {
  Side a(4, 0, 1), b(4, 0, 2);
  const DeviceSide device_a(a), device_b(b, kPlantedAt);
  run_spans(DtypePair::kFloat32Float32, kOperations[0], spans_of(device_a, device_b), true);
  return 0;
}

// The project's kernels have neither shared memory nor barriers; these two are wrong with both.
__global__ void shared_race_kernel(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void barrier_kernel(int* out) {
  if (threadIdx.x < 48) __syncthreads();
  out[threadIdx.x] = 1;
}

int run_faulty(void (*kernel)(int*), int num_threads) {
  void* out = nullptr;
  check(cudaMalloc(&out, num_threads * sizeof(int)));
  cudaLaunchConfig_t config{};
  config.gridDim.x = 1;
  config.blockDim.x = num_threads;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<int*>(out)));
  check(cudaDeviceSynchronize());
  check(cudaFree(out));
  return 0;
}

#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what.empty()) return run_threads() + run_all() + run_averages() + run_all_sums();
  if (what == "overrun") return overrun();
  if (what == "shift") return shift(argc + 40);
  if (what == "race") return race();
#ifdef __CUDACC__
  if (what == "unwritten") return unwritten();
  if (what == "shared race") return run_faulty(shared_race_kernel, 64);
  if (what == "barrier") return run_faulty(barrier_kernel, 64);
#endif
  std::printf("no such fault: %s\n", what.c_str());
  return 2;
}
