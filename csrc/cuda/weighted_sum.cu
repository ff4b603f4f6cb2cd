// out += the sum of weights[k] * inputs[k]
#include <cuda_runtime.h>

#include "../ema_math.h"
#include "vec.cuh"
#include "weighted_sum.h"

namespace fused_ema::cuda {
namespace {

constexpr int kThreads = 256;
// Inputs whose loads a thread issues before it adds the first of them.
constexpr int kSideBySide = 8;
constexpr int kBlocksPerSm = 8;

// Elements that a thread takes at once: 16 bytes of fp32 and fp64 inputs, 8 of others.
template <typename In>
constexpr int kElements = sizeof(In) == 8 ? 2 : 4;

// Of an access, 16 bytes at most.
template <typename T, int N>
constexpr int kPacket = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;

// kNum consecutive elements.
template <bool kAligned, typename T, int kNum>
struct Elements {
  static constexpr int kWidth = kPacket<T, kNum>;
  Vec<T, kWidth> packets[kNum / kWidth];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kNum / kWidth; ++i) load_vec<kAligned>(packets[i], from + i * kWidth);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kNum / kWidth; ++i) store_vec<kAligned>(to + i * kWidth, packets[i]);
  }
  __device__ __forceinline__ T& operator[](int i) { return packets[i / kWidth].e[i % kWidth]; }
};

// Up to kSideBySide inputs from the k-th on, and from element `first` on.
template <bool kAll, bool kAligned, int kNum, typename In>
__device__ __forceinline__ void add(double (&sums)[kNum], const WeightedSum& sum, int k,
                                    int64_t first) {
  Elements<kAligned, In, kNum> x[kSideBySide];
#pragma unroll
  for (int u = 0; u < kSideBySide; ++u) {
    if (kAll || k + u < sum.num_inputs) {
      x[u].load(static_cast<const In*>(sum.inputs[k + u]) + first);
    }
  }
#pragma unroll
  for (int u = 0; u < kSideBySide; ++u) {
    if (kAll || k + u < sum.num_inputs) {
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        stay_as_loaded(x[u][i]);
        sums[i] = fma(sum.weights[k + u], static_cast<double>(load(x[u][i])), sums[i]);
      }
    }
  }
}

// kNum elements from `first` on.
template <bool kAligned, int kNum, typename Out, typename In>
__device__ __forceinline__ void run_elements(const WeightedSum& sum, int64_t first) {
  Out* const out = static_cast<Out*>(sum.out) + first;
  Elements<kAligned, Out, kNum> values;
  values.load(out);
  double sums[kNum];
#pragma unroll
  for (int i = 0; i < kNum; ++i) sums[i] = values[i];
  int k = 0;
  for (; k + kSideBySide <= sum.num_inputs; k += kSideBySide) {
    add<true, kAligned, kNum, In>(sums, sum, k, first);
  }
  if (k < sum.num_inputs) add<false, kAligned, kNum, In>(sums, sum, k, first);
#pragma unroll
  for (int i = 0; i < kNum; ++i) values[i] = static_cast<Out>(sums[i]);
  values.store(out);
}

// One element.
template <typename Out, typename In>
__device__ __forceinline__ void run_element(const WeightedSum& sum, int64_t i) {
  Out* const out = static_cast<Out*>(sum.out) + i;
  double total = *out;
  for (int k = 0; k < sum.num_inputs; ++k) {
    const In x = static_cast<const In*>(sum.inputs[k])[i];
    total = fma(sum.weights[k], static_cast<double>(load(x)), total);
  }
  *out = static_cast<Out>(total);
}

template <bool kAligned, typename Out, typename In>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const __grid_constant__ WeightedSum sum) {
  constexpr int kNum = kElements<In>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t whole = sum.n / kNum;
  for (int64_t i = thread; i < whole; i += step) {
    run_elements<kAligned, kNum, Out, In>(sum, i * kNum);
  }
  // Less than kNum are left.
  const int64_t last = whole * kNum + thread;
  if (last < sum.n) run_element<Out, In>(sum, last);
}

template <typename Out, typename In>
bool all_aligned(const WeightedSum& sum) {
  constexpr int kNum = kElements<In>;
  const auto fits = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  bool aligned = fits(sum.out, kPacket<Out, kNum> * sizeof(Out));
  for (int k = 0; k < sum.num_inputs; ++k) {
    aligned = aligned && fits(sum.inputs[k], kPacket<In, kNum> * sizeof(In));
  }
  return aligned;
}

template <typename Out, typename In>
Status launch(const WeightedSum& sum, Stream stream) {
  if (sum.n == 0) return cudaSuccess;
  int device = 0;
  int num_sms = 0;
  Status status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  constexpr int64_t kABlock = int64_t{kThreads} * kElements<In>;
  const int64_t wanted = (sum.n + kABlock - 1) / kABlock;
  const int64_t most = int64_t{num_sms} * kBlocksPerSm;
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<uint32_t>(wanted < most ? wanted : most);
  config.blockDim.x = kThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  if (all_aligned<Out, In>(sum)) {
    return cudaLaunchKernelEx(&config, weighted_sum_kernel<true, Out, In>, sum);
  }
  return cudaLaunchKernelEx(&config, weighted_sum_kernel<false, Out, In>, sum);
}

}  // namespace

Status launch_weighted_sum(Dtype out, Dtype input, const WeightedSum& sum, Stream stream) {
#define FUSED_EMA_CASE(Out, In)                                  \
  if (out == DtypeOf<Out>::value && input == DtypeOf<In>::value) \
    return launch<Out, In>(sum, stream);
  FUSED_EMA_FOR_EACH_SUM(FUSED_EMA_CASE)
#undef FUSED_EMA_CASE
  return cudaErrorInvalidValue;
}

}  // namespace fused_ema::cuda
