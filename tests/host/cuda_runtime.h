// Stands in for CUDA's header of this name, so that g++ compiles the files of csrc/cuda/ as they
// are. A launch runs the kernel for one thread after the other, block after block: the kernels have
// no barrier and share no memory between threads, so any order is right.
#pragma once

#include <cstddef>
#include <cstdint>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define CUDART_VERSION 13000

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline thread_local dim3 blockIdx, threadIdx;

namespace fused_ema::host {
inline thread_local int num_launches = 0;
}  // namespace fused_ema::host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  ++fused_ema::host::num_launches;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(arguments...);
  }
  return cudaSuccess;
}
