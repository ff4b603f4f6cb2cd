// Questions about streams and devices, asked of the CUDA runtime directly: torch's generic
// isStreamCapturing is missing in 2.11, and a torch built for CPU has no CUDA header to offer.
#include <cuda_runtime.h>

#include "launch.h"

#ifndef FUSED_EMA_CUDA_ARCHS  // set by setup.py
#define FUSED_EMA_CUDA_ARCHS "unknown"
#endif

namespace fused_ema::cuda {

const char* status_text(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

Status keep_with_graph(Stream stream, void* object, void (*release)(void*)) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  cudaError_t status = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &capture,
                                                nullptr, &graph, nullptr, nullptr, nullptr);
#else
  cudaError_t status = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &capture,
                                                nullptr, &graph, nullptr, nullptr);
#endif
  cudaUserObject_t kept = nullptr;
  if (status == cudaSuccess) {
    status = cudaUserObjectCreate(&kept, object, release, 1, cudaUserObjectNoDestructorSync);
  }
  if (status != cudaSuccess) {
    release(object);
    return status;
  }
  status = cudaGraphRetainUserObject(graph, kept, 1, cudaGraphUserObjectMove);
  if (status != cudaSuccess) cudaUserObjectRelease(kept, 1);
  return status;
}

bool serves_device(int device) {
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return major >= 8;
}

const char* built_architectures() { return FUSED_EMA_CUDA_ARCHS; }

}  // namespace fused_ema::cuda
