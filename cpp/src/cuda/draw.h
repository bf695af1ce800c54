// draw.h -- distinct random numbers by the threads of a block, in ascending order
#pragma once
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "rewire_math.h"

namespace widehead::cuda {

// s [n] ascending, for any n: a bitonic network whose exchanges all put the smaller number first, so that what is
// missing to the next power of two counts as infinite and never moves. By all threads of a block, whose writes to s must
// be visible.
template <class T>
__device__ inline void sort_ascending(T* s, i64 n) {
  const auto threads = static_cast<i64>(blockDim.x);
  i64 whole = 2;
  while (whole < n) whole *= 2;
  for (i64 size = 2; size <= whole && n > 1; size *= 2)
    for (i64 apart = size / 2; apart > 0; apart /= 2) {
      for (i64 p = threadIdx.x; p < whole / 2; p += threads) {
        const i64 i = 2 * p - (p & (apart - 1));
        const i64 j = apart == size / 2 ? (i ^ (size - 1)) : i + apart;
        if (j >= n) continue;
        const T a = s[i], b = s[j];
        if (b < a) {
          s[i] = b;
          s[j] = a;
        }
      }
      __syncthreads();
    }
}

// out [floyd.n] gets the draw, ascending; visible to all threads of the block afterwards.
template <class T>
__device__ inline void draw_ascending(const Floyd& floyd, T* out) {
  const auto threads = static_cast<i64>(blockDim.x);
  for (i64 j = threadIdx.x; j < floyd.n; j += threads) out[j] = static_cast<T>(floyd.draw(j));
  __syncthreads();
  for (i64 j = 1; j < floyd.n; ++j) {
    const T drawn = out[j];
    bool taken = false;
    for (i64 i = threadIdx.x; i < j; i += threads) taken = taken || out[i] == drawn;
    // Only the thread that will compare with it later writes it, so that one barrier does.
    if (__syncthreads_or(taken) && j % threads == threadIdx.x) out[j] = static_cast<T>(floyd.top(j));
  }
  __syncthreads();
  sort_ascending(out, floyd.n);
}

}  // namespace widehead::cuda
