// cuda_runtime.h -- the part of the CUDA runtime that the kernels use, on the host (see emulator.h)
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __grid_constant__

#define WIDEHEAD_EMULATED_VECTOR(type, element, bytes) \
  struct alignas(bytes) type##2 { element x, y; };     \
  struct alignas(2 * bytes) type##4 { element x, y, z, w; };
WIDEHEAD_EMULATED_VECTOR(float, float, 8)
WIDEHEAD_EMULATED_VECTOR(uint, unsigned, 8)
WIDEHEAD_EMULATED_VECTOR(int, int, 8)
struct alignas(16) double2 {
  double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// Barriers and warp operations. Only whole warps take part: that is how the kernels are written.
inline void __syncthreads() { emulator::barrier(false); }
inline int __syncthreads_or(int flag) { return emulator::barrier(flag != 0) > 0; }
inline int __syncthreads_and(int flag) { return emulator::barrier(flag == 0) == 0; }
inline int __syncthreads_count(int flag) { return emulator::barrier(flag != 0); }
inline void __syncwarp(unsigned = ~0u) {
  const char nothing = 0;
  emulator::exchange(&nothing, 1);
}
template <class T>
T emulated_shuffle(T value, int from) {
  const unsigned char* slots = emulator::exchange(&value, sizeof(T));
  T out;
  std::memcpy(&out, slots + static_cast<std::size_t>(from & 31) * emulator::kSlot, sizeof(T));
  return out;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated_shuffle(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_shuffle(value, emulator::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = emulator::lane() + delta;
  return emulated_shuffle(value, from < 32 ? from : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = emulator::lane() - delta;
  return emulated_shuffle(value, from >= 0 ? from : emulator::lane());
}
inline unsigned __ballot_sync(unsigned, int flag) {
  const int mine = flag != 0;
  const unsigned char* slots = emulator::exchange(&mine, sizeof mine);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) {
    int theirs;
    std::memcpy(&theirs, slots + i * emulator::kSlot, sizeof theirs);
    bits |= static_cast<unsigned>(theirs) << i;
  }
  return bits;
}
inline int __any_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) != 0; }
inline int __all_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) == ~0u; }

// Fibers switch at barriers only, so plain memory operations are atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <class T>
T atomicExch(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
template <class T>
T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}
template <class T>
T atomicCAS(T* at, T compare, T value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}
inline void __threadfence() {}
template <class T>
T __ldg(const T* at) {
  return *at;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The runtime. One device, whose memory is the host's.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    // Small, so that tests walk many tiles. WIDEHEAD_EMULATED_L2 sets it.
    case cudaDevAttrL2CacheSize: {
      const char* text = std::getenv("WIDEHEAD_EMULATED_L2");
      *value = text ? std::atoi(text) : 256 << 10;
      break;
    }
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    // WIDEHEAD_EMULATED_SHARED: what a block is told that it may ask for.
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: {
      const char* text = std::getenv("WIDEHEAD_EMULATED_SHARED");
      *value = text ? std::atoi(text) : 227 << 10;
      break;
    }
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode mine = cudaStreamCaptureModeGlobal;
  std::swap(mine, *mode);
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  std::tuple<std::decay_t<Expected>...> arguments(static_cast<Expected>(std::forward<Given>(given))...);
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, arguments); });
  return cudaSuccess;
}
