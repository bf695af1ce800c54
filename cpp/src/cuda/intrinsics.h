// intrinsics.h -- what only a GPU can do, behind functions: inline PTX, conversions, fast exponentials, shared memory
//
// tests/cuda_host/cuda/intrinsics.h stands in for this file where the kernels are tested on the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "widehead/view.h"

// Before compute capability 8.0 there are neither these products nor these copies; no kernel that has them is launched
// there (fused_fits), but every kernel is compiled for every architecture.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define WIDEHEAD_SINCE_SM80(...) __trap()
#else
#define WIDEHEAD_SINCE_SM80(...) asm volatile(__VA_ARGS__)
#endif

namespace widehead::cuda {

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char widehead_shared[];
  return widehead_shared;
}

// About 2 units in the last place; results below the normal range are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + exp(-x)), as exact; 0 where it is below the normal range.
__device__ inline float fast_sigmoid(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 + fast_exp2(x * -1.4426950408889634f)));
  return y;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T, class Real>
__device__ inline T from_float(Real x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}
// Two numbers in one register, `low` in the low half.
template <class T>
__device__ inline std::uint32_t pack2(float low, float high) {
  std::uint32_t r;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    r = *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    r = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  return r;
}

// d += A B on 16 x 8 x 16, A row-major, B column-major; fragments as PTX's mma.m16n8k16 lays them out.
template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    WIDEHEAD_SINCE_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    WIDEHEAD_SINCE_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+"
                                                                                                                    "f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r brings the address of row r of matrix i, aligned to 16 bytes.
template <bool kTransposed>
__device__ inline void ldmatrix4(std::uint32_t (&r)[4], const void* row) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
}

// 16 bytes to shared memory without passing through registers; what lies past `valid` bytes becomes zero.
__device__ inline void copy_async16(void* shared, const void* global, int valid = 16) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  WIDEHEAD_SINCE_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(valid) : "memory");
}
__device__ inline void copy_commit() { WIDEHEAD_SINCE_SM80("cp.async.commit_group;" :: : "memory"); }
template <int kPending>
__device__ inline void copy_wait() {
  WIDEHEAD_SINCE_SM80("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace widehead::cuda

#undef WIDEHEAD_SINCE_SM80
