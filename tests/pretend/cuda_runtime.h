// Before CUDA's header of this name on g++'s path: the files of csrc/cuda/ with CUDA's own types,
// and launches that runtime.cpp does or notes. A kernel runs for one thread after the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <tuple>

#undef __device__
#undef __global__
#undef __grid_constant__
#undef __forceinline__
#undef __launch_bounds__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline thread_local dim3 gridDim, blockIdx, threadIdx;

extern "C" void pretend_launch(cudaStream_t stream, std::function<void()>* work);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  // For measuring what the host does on the way to a launch.
  static const bool does_nothing = std::getenv("PRETEND_NO_WORK") != nullptr;
  if (does_nothing) return cudaSuccess;
  // A graph keeps a launch's arguments, and std::function wants to copy what it holds.
  auto kept = std::make_shared<std::tuple<Arguments...>>(arguments...);
  const dim3 grid = config->gridDim, block = config->blockDim;
  pretend_launch(config->stream, new std::function<void()>([=] {
                   gridDim = grid;
                   for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                     for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
                       std::apply(kernel, *kept);
                   }
                 }));
  return cudaSuccess;
}
