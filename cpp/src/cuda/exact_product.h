// exact_product.h -- products of small matrices whose sizes only the device knows
//
// Tiles of 32 x 32, so that a few hundred rows and columns keep a GPU busy; four groups of threads share the depth of a
// tile and are summed in order. Full precision: no tensor cores. An Op says
//   using Factor;  static constexpr bool kRowsByDepth, kColumnsByDepth   which way its elements lie together
//   extent(z) -> {rows, columns, depth}; 0 rows: nothing to do    skips(row, column) of a tile's first
//   a(z, i, k), b(z, k, j), store(z, i, j, sum)
#pragma once
#include <cuda_runtime.h>

#include "cuda/intrinsics.h"
#include "cuda/launch.h"

namespace widehead::cuda {

struct Extent {
  int rows, columns, depth;
};
__host__ __device__ inline Extent extent_of(i64 rows, i64 columns, i64 depth) {
  return {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(depth)};
}
// Element (row, column) of a matrix: a multiplication of 32 bits each.
__host__ __device__ inline i64 element(int row, i64 stride, int column) {
  return static_cast<i64>(row) * static_cast<int>(stride) + column;
}

constexpr int kProductTile = 32, kProductThreads = 256, kProductStride = kProductTile + 4;

template <class Factor>
struct alignas(16) FourOf {
  Factor x[4];
};

template <class Op>
__global__ void __launch_bounds__(kProductThreads) product_kernel(Op op) {
  using Factor = typename Op::Factor;
  constexpr int kTile = kProductTile, kStride = kProductStride, kEach = kTile * kTile / kProductThreads;
  constexpr int kGroups = kProductThreads / 64, kShare = kTile / kGroups;
  auto* const as = reinterpret_cast<Factor*>(dynamic_shared());
  auto* const bs = as + kTile * kStride;
  const int z = static_cast<int>(blockIdx.z), thread = static_cast<int>(threadIdx.x);
  const int i0 = static_cast<int>(blockIdx.x) * kTile, j0 = static_cast<int>(blockIdx.y) * kTile;
  const Extent e = op.extent(z);
  if (i0 >= e.rows || j0 >= e.columns || op.skips(i0, j0)) return;

  const int fast = thread % kTile, slow = thread / kTile;  // of the element that a thread loads first
  const int group = thread / 64, ti = thread % 64 / 8 * 4, tj = thread % 8 * 4;
  Factor sums[4][4] = {}, a[kEach], b[kEach];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int other = slow + n * (kProductThreads / kTile);
      const int i = i0 + (Op::kRowsByDepth ? other : fast), ka = k0 + (Op::kRowsByDepth ? fast : other);
      const int j = j0 + (Op::kColumnsByDepth ? other : fast), kb = k0 + (Op::kColumnsByDepth ? fast : other);
      a[n] = i < e.rows && ka < e.depth ? op.a(z, i, ka) : Factor{0};
      b[n] = j < e.columns && kb < e.depth ? op.b(z, kb, j) : Factor{0};
    }
  };
  fetch(0);
  for (int k0 = 0; k0 < e.depth; k0 += kTile) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int other = slow + n * (kProductThreads / kTile);
      as[Op::kRowsByDepth ? fast * kStride + other : other * kStride + fast] = a[n];
      bs[Op::kColumnsByDepth ? fast * kStride + other : other * kStride + fast] = b[n];
    }
    __syncthreads();
    fetch(k0 + kTile);
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      const auto x = *reinterpret_cast<const FourOf<Factor>*>(as + (group * kShare + k) * kStride + ti);
      const auto y = *reinterpret_cast<const FourOf<Factor>*>(bs + (group * kShare + k) * kStride + tj);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += x.x[r] * y.x[c];
    }
    __syncthreads();
  }
  for (int turn = 0; turn < kGroups; ++turn) {
    if (group == turn)
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          Factor& to = as[(ti + r) * kStride + tj + c];
          to = turn == 0 ? sums[r][c] : to + sums[r][c];
        }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int r = slow + n * (kProductThreads / kTile);
    if (i0 + r < e.rows && j0 + fast < e.columns) op.store(z, i0 + r, j0 + fast, as[r * kStride + fast]);
  }
}

// At most so many rows, columns and batches.
template <class Op>
void launch_product(const Device& device, const Op& op, i64 rows, i64 columns, unsigned batches = 1) {
  if (rows == 0 || columns == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kProductTile)),
                  static_cast<unsigned>(ceil_div(columns, kProductTile)), batches);
  constexpr std::size_t kBytes = 2 * kProductTile * kProductStride * sizeof(typename Op::Factor);
  launch(device, grid, kProductThreads, kBytes, product_kernel<Op>, op);
}

}  // namespace widehead::cuda
