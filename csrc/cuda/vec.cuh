// Device only. Vectors of elements that move in one access.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../tiles.h"

namespace fused_ema::cuda {

// 16 bytes, or 8 of the narrower side of a pair.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  using Packet = std::conditional_t<sizeof(T) * N == sizeof(uint4), uint4, uint2>;
  static_assert(sizeof(T) * N == sizeof(Packet), "a Vec moves in one access");
  T e[N];
};

// A pointer that was itself read from memory: without the hint its accesses become generic ones
// (LD, ST), which first find out the address space.
template <typename T>
__device__ __forceinline__ T* global_pointer(void* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return static_cast<T*>(pointer);
}

template <int N, typename T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T, N>) == 0;
}

template <typename T, int N>
__device__ __forceinline__ void copy_packet(Vec<T, N>* to, const Vec<T, N>* from) {
  using Packet = typename Vec<T, N>::Packet;
  *reinterpret_cast<Packet*>(to) = *reinterpret_cast<const Packet*>(from);
}

// kAligned: one access. Otherwise one an element; neighbouring lanes still share sectors, so the
// bytes moved stay the same.
template <bool kAligned, typename T, int N>
__device__ __forceinline__ void load_vec(Vec<T, N>& to, const T* from) {
  if constexpr (kAligned) {
    copy_packet(&to, reinterpret_cast<const Vec<T, N>*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to.e[i] = from[i];
  }
}

template <bool kAligned, typename T, int N>
__device__ __forceinline__ void store_vec(T* to, const Vec<T, N>& from) {
  if constexpr (kAligned) {
    copy_packet(reinterpret_cast<Vec<T, N>*>(to), &from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from.e[i];
  }
}

// Whatever is computed from the value is computed after this. Without it nvcc 13.0 turns a bf16
// element into fp32 right behind its load, and so waits for it before it issues the next load.
template <typename T>
__device__ __forceinline__ void stay_as_loaded([[maybe_unused]] T& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm("" : "+h"(bits));
    memcpy(&value, &bits, sizeof(T));
  } else if constexpr (std::is_same_v<T, double>) {
    asm("" : "+d"(value));
  } else {
    uint32_t words[sizeof(T) / sizeof(uint32_t)];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (uint32_t& word : words) asm("" : "+r"(word));
    memcpy(&value, words, sizeof(T));
  }
#endif
}

}  // namespace fused_ema::cuda
