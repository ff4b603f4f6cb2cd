// A CUDA runtime and driver whose device is this processor, for a torch that was built for CUDA.
//
// Device memory is host memory, and what is launched, copied or filled is done at once, or noted
// while its stream is being captured and done by each replay. Kernels of this project run, as g++
// compiled them (cuda_runtime.h); torch's own do nothing: torch_on_cpu.py does their work. So every
// decision of the host is real, and nothing about time, memory order or concurrency is.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
// Functions that torch needs to be there, and that have nothing to do here.
#define SUCCEEDS(name, ...) \
  API cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

namespace {

using Work = std::function<void()>;

// Called when the graph that holds it is gone.
struct UserObject {
  void* object;
  cudaHostFn_t release;
  ~UserObject() { release(object); }
};

struct Graph {
  std::vector<Work> nodes;
  std::vector<std::shared_ptr<UserObject>> kept;
};

struct Capture {
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
  std::set<cudaStream_t> streams;
  unsigned long long id = 0;
};

struct Event {
  double seconds = 0;
  unsigned long long capture = 0;  // that it was recorded in
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<void*, size_t> allocations;
  size_t allocated_bytes = 0;
  std::unique_ptr<Capture> capture;
  unsigned long long num_captures = 0;
  std::map<const void*, std::string> kernels;
  std::set<const void*> idle_kernels;
  std::atomic<long> num_launches{0}, num_copies{0}, num_waits{0};

  static Runtime& it() {
    static auto* const runtime = new Runtime;
    return *runtime;
  }
  bool is_captured(cudaStream_t stream) const {
    return capture != nullptr && capture->streams.count(stream) > 0;
  }
};

using Lock = std::lock_guard<std::recursive_mutex>;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

size_t memory_bytes() {
  const char* gigabytes = std::getenv("PRETEND_GB");
  return static_cast<size_t>(std::atof(gigabytes != nullptr ? gigabytes : "6") * 1e9);
}

void enqueue(cudaStream_t stream, Work work) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  if (runtime.is_captured(stream)) {
    runtime.capture->graph->nodes.push_back(std::move(work));
  } else {
    work();
  }
}

// One of torch's kernels, which would leave its results unwritten: torch_on_cpu.py should have been
// there before it.
cudaError_t launch_idle(const void* kernel) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  if (runtime.idle_kernels.insert(kernel).second) {
    std::fprintf(stderr, "pretended: %s does nothing\n", runtime.kernels[kernel].c_str());
  }
  return cudaSuccess;
}

}  // namespace

// ---- for cuda_runtime.h and torch_on_cpu.py

API void pretend_launch(cudaStream_t stream, Work* work) {
  ++Runtime::it().num_launches;
  enqueue(stream, std::move(*work));
  delete work;
}

// A callback of Python's, with the number that it knows its work by.
API void pretend_enqueue(cudaStream_t stream, void (*callback)(long), long number) {
  enqueue(stream, [=] { callback(number); });
}

// Of a copy between the devices that torch_on_cpu.py has done.
API void pretend_copy() { ++Runtime::it().num_copies; }

API void pretend_counts(long counts[3]) {
  const Runtime& runtime = Runtime::it();
  counts[0] = runtime.num_launches;
  counts[1] = runtime.num_copies;
  counts[2] = runtime.num_waits;
}

// ---- kernels of torch

API void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*,
                                uint3*, dim3*, dim3*, int*) {
  const Lock lock(Runtime::it().mutex);
  Runtime::it().kernels[kernel] = name;
}
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void* stream) {
  *grid = *block = dim3{1, 1, 1};
  *bytes = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* kernel) {
  *to = static_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch_idle(kernel);
}
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch_idle(kernel);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
  return launch_idle(kernel);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t,
                                            cudaStream_t) {
  return launch_idle(kernel);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
SUCCEEDS(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                              size_t) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                       int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// ---- the device

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Pretended H100");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->totalGlobalMem = memory_bytes();
  properties->l2CacheSize = 1 << 20;  // small, so that few sets of tensors are cold
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = 1024;
  properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = INT32_MAX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<cudaDeviceAttr, int> known = {{cudaDevAttrComputeCapabilityMajor, 9},
                                               {cudaDevAttrMultiProcessorCount, 132},
                                               {cudaDevAttrMaxThreadsPerBlock, 1024},
                                               {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
                                               {cudaDevAttrWarpSize, 32},
                                               {cudaDevAttrL2CacheSize, 1 << 20}};
  const auto found = known.find(attribute);
  *value = found != known.end() ? found->second : 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  ++Runtime::it().num_waits;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(cudaError_t) { return "a pretended error"; }
API const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "a pretended error";
}
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// ---- memory

API cudaError_t cudaMalloc(void** memory, size_t bytes) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  if (runtime.allocated_bytes + bytes > memory_bytes()) return failed(cudaErrorMemoryAllocation);
  *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(*memory, 0xa5, bytes);  // what nobody has written must not look right
  runtime.allocations[*memory] = bytes;
  runtime.allocated_bytes += bytes;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* memory) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  const auto found = runtime.allocations.find(memory);
  if (found == runtime.allocations.end()) return cudaSuccess;
  std::memset(memory, 0xa5, found->second);
  runtime.allocated_bytes -= found->second;
  runtime.allocations.erase(found);
  std::free(memory);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = memory_bytes();
  *free_bytes = *total_bytes - Runtime::it().allocated_bytes;
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  *attributes = {};
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  attributes->type = cudaMemoryTypeHost;
  auto after = runtime.allocations.upper_bound(const_cast<void*>(pointer));
  if (after != runtime.allocations.begin()) {
    const auto& [start, bytes] = *std::prev(after);
    const bool inside = pointer < static_cast<char*>(start) + bytes;
    if (inside) attributes->type = cudaMemoryTypeDevice;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                cudaStream_t stream) {
  ++Runtime::it().num_copies;
  enqueue(stream, [=] { std::memmove(to, from, bytes); });
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  ++Runtime::it().num_waits;
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
API cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  ++Runtime::it().num_copies;
  enqueue(stream, [=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

// ---- streams and events

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  if (runtime.is_captured(stream)) return failed(cudaErrorStreamCaptureUnsupported);
  ++runtime.num_waits;
  return cudaSuccess;
}
SUCCEEDS(cudaStreamQuery, cudaStream_t)
SUCCEEDS(cudaStreamDestroy, cudaStream_t)
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  auto& recorded = *reinterpret_cast<Event*>(event);
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  recorded.seconds = std::chrono::duration<double>(now).count();
  recorded.capture = runtime.is_captured(stream) ? runtime.capture->id : 0;
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  const unsigned long long capture = reinterpret_cast<Event*>(event)->capture;
  if (runtime.capture && runtime.capture->id == capture) runtime.capture->streams.insert(stream);
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++Runtime::it().num_waits;
  return cudaSuccess;
}
SUCCEEDS(cudaEventQuery, cudaEvent_t)
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const double seconds =
      reinterpret_cast<Event*>(end)->seconds - reinterpret_cast<Event*>(start)->seconds;
  *milliseconds = static_cast<float>(std::max(1e-4, seconds * 1e3));
  return cudaSuccess;
}

// ---- graphs

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  if (runtime.capture) return failed(cudaErrorIllegalState);
  runtime.capture = std::make_unique<Capture>();
  runtime.capture->streams.insert(stream);
  runtime.capture->id = ++runtime.num_captures;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  *graph = reinterpret_cast<cudaGraph_t>(runtime.capture->graph.release());
  runtime.capture.reset();
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  *status =
      runtime.is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                         size_t* num_dependencies) {
  Runtime& runtime = Runtime::it();
  const Lock lock(runtime.mutex);
  cudaStreamIsCapturing(stream, status);
  const bool is_captured = runtime.is_captured(stream);
  if (id != nullptr) *id = is_captured ? runtime.capture->id : 0;
  if (graph != nullptr && is_captured) {
    *graph = reinterpret_cast<cudaGraph_t>(runtime.capture->graph.get());
  }
  if (num_dependencies != nullptr) *num_dependencies = 0;
  return cudaSuccess;
}
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode*)
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                              unsigned long long) {
  *executable =
      reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<const Graph*>(graph)));
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (const Work& node : reinterpret_cast<const Graph*>(executable)->nodes) node();
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void* object, cudaHostFn_t release,
                                     unsigned, unsigned) {
  *made = reinterpret_cast<cudaUserObject_t>(new UserObject{object, release});
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  delete reinterpret_cast<UserObject*>(object);
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned,
                                          unsigned) {
  reinterpret_cast<Graph*>(graph)->kept.emplace_back(reinterpret_cast<UserObject*>(object));
  return cudaSuccess;
}

// ---- the driver, of which torch asks only whether there is a context

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
API CUresult pretend_unsupported() { return CUDA_ERROR_NOT_SUPPORTED; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = is_known ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState)
                       : reinterpret_cast<void*>(pretend_unsupported);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
