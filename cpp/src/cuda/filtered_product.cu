// filtered_product.cu -- products that leave out the zero blocks of their left factor
#include "cuda/filtered_product.h"
#include "cuda/intrinsics.h"

namespace widehead::cuda {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr int kThreads = 256;      // eight warps, four down and two across, 32 x 64 results each
constexpr int kM = 128, kN = 128;  // results of a block
constexpr int kDepth = 64;         // of a step
constexpr int kStages = 3;
constexpr int kListed = 1024;  // steps that a list holds; longer sums take several
constexpr int kLeft = kM * kDepth, kRight = kDepth * kN, kStage = kLeft + kRight;
constexpr int kBytes = kStages * kStage * 2;

// Element offset of a 16-byte chunk in rows of `width` elements; permuted so that ldmatrix meets no bank twice.
template <int kWidth>
__device__ inline int place(int row, int chunk) {
  return row * kWidth + ((chunk ^ (row & 7)) * 8);
}

// Starts copying a piece of kRows x kColumns elements; what lies outside of rows x columns becomes zero. A thread keeps
// its chunk, and its rows are a multiple of 8 apart: additions are all that is left of the addresses.
template <int kRows, int kColumns, class W>
__device__ inline void fetch(W* to, const W* from, i64 stride, i64 first_row, i64 rows, i64 first_column, i64 columns) {
  constexpr int kChunks = kColumns / 8, kApart = kThreads / kChunks;
  static_assert(kApart % 8 == 0 && kRows % kApart == 0);
  const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
  const i64 column = first_column + chunk * 8;
  const int valid = static_cast<int>(at_least(0, at_most(columns - column, 8))) * 2;
  const i64 left = valid > 0 ? rows - first_row - row : 0;
  const W* at = from + (first_row + row) * stride + column;
  to += place<kColumns>(row, chunk);
#pragma unroll
  for (int r = 0; r < kRows; r += kApart) {
    const bool there = r < left;
    copy_async16(to + r * kColumns, there ? at : from, there ? valid : 0);
    at += kApart * stride;
  }
}

// kTransposed: results are of classes, sums go over examples.
template <class W, bool kTransposed>
struct Walk {
  const FilteredTile<W>& t;

  __device__ i64 depth() const { return kTransposed ? t.rows : t.count; }
  // Whether any of the step's part of G, for results from `m` on, is left.
  __device__ bool any(i64 m, i64 k) const {
    const i64 row = kTransposed ? k : m, rows = kTransposed ? kDepth : kM,
              column = (kTransposed ? m : k) / kFlagColumns;
    bool found = false;
    for (i64 r = row; r < row + rows && r < t.rows; r += kFlagRows)
      found = found || t.flags[r / kFlagRows * t.flag_stride + column] != 0;
    return found;
  }
};

// The steps from `first` on with something in them, ascending; returns where the next list begins.
template <class W, bool kTransposed>
__device__ inline i64 list_steps(const Walk<W, kTransposed>& walk, i64 m, i64 first, unsigned short* list, int* count) {
  const i64 steps = ceil_div(walk.depth(), kDepth), end = at_most(steps, first + kListed);
  if (threadIdx.x < 32) {
    int n = 0;
    for (i64 base = first; base < end; base += 32) {
      const i64 step = base + threadIdx.x;
      const unsigned found = __ballot_sync(kAllLanes, step < end && walk.any(m, step * kDepth));
      const unsigned below = found & ((1u << threadIdx.x) - 1);
      if ((found >> threadIdx.x) & 1u) list[n + __popc(below)] = static_cast<unsigned short>(step - first);
      n += __popc(found);
    }
    if (threadIdx.x == 0) *count = n;
  }
  __syncthreads();
  return end;
}

template <class W, bool kTransposed>
__device__ inline void multiply_step(const W* left, const W* right, float (&c)[2][8][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int matrix = lane / 8, r = lane % 8, m0 = warp % 4 * 32, n0 = warp / 4 * 64;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int m = m0 + t * 16 + matrix % 2 * 8;
      if constexpr (kTransposed) {
        ldmatrix4<true>(a[t], left + place<kM>(k + matrix / 2 * 8 + r, m / 8));
      } else {
        ldmatrix4<false>(a[t], left + place<kDepth>(m + r, k / 8 + matrix / 2));
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t b[4];
      ldmatrix4<true>(b, right + place<kN>(k + matrix % 2 * 8 + r, n0 / 8 + n * 2 + matrix / 2));
      const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        mma<W>(c[t][2 * n], a[t], low);
        mma<W>(c[t][2 * n + 1], a[t], high);
      }
    }
  }
}

template <class W, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2) filtered_kernel(FilteredTile<W> tile, const W* factor, i64 stride, int d,
                                                               float* out, i64 out_stride, bool accumulate) {
  __shared__ unsigned short list[kListed];
  __shared__ int listed;
  auto* shared = reinterpret_cast<W*>(dynamic_shared());
  const Walk<W, kTransposed> walk{tile};
  const i64 results = kTransposed ? tile.count : tile.rows;
  const i64 across = ceil_div(d, kN), m0 = blockIdx.x / across * kM, n0 = blockIdx.x % across * kN;
  float c[2][8][4] = {};
  const i64 steps = ceil_div(walk.depth(), kDepth);
  for (i64 first = 0; first < steps;) {
    const i64 begin = first;
    first = list_steps(walk, m0, begin, list, &listed);
    const int n = listed;
    const auto start = [&](int i) {
      if (i < n) {
        W* left = shared + i % kStages * kStage;
        const i64 k = (begin + list[i]) * kDepth;
        if constexpr (kTransposed) {
          fetch<kDepth, kM>(left, tile.g, tile.g_stride, k, tile.rows, m0, tile.count);
        } else {
          fetch<kM, kDepth>(left, tile.g, tile.g_stride, m0, tile.rows, k, tile.count);
        }
        fetch<kDepth, kN>(left + kLeft, factor, stride, k, walk.depth(), n0, static_cast<i64>(d));
      }
      copy_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) start(i);
    for (int i = 0; i < n; ++i) {
      copy_wait<kStages - 2>();
      __syncthreads();
      start(i + kStages - 1);
      const W* left = shared + i % kStages * kStage;
      multiply_step<W, kTransposed>(left, left + kLeft, c);
    }
    copy_wait<0>();
    __syncthreads();  // list and stages are free again
  }
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const i64 m = m0 + warp % 4 * 32 + t * 16 + lane / 4 + i / 2 * 8;
        const i64 column = n0 + warp / 4 * 64 + n * 8 + lane % 4 * 2 + i % 2;
        if (m >= results || column >= d) continue;
        float& at = out[m * out_stride + column];
        at = accumulate ? at + c[t][n][i] : c[t][n][i];
      }
}

template <class W, bool kTransposed>
void run(const Device& device, const FilteredTile<W>& tile, const W* factor, i64 stride, int d, float* c, i64 c_stride,
         bool accumulate) {
  const i64 results = kTransposed ? tile.count : tile.rows;
  launch(device, static_cast<unsigned>(ceil_div(results, kM) * ceil_div(d, kN)), kThreads, kBytes,
         filtered_kernel<W, kTransposed>, tile, factor, stride, d, c, c_stride, accumulate);
}

}  // namespace

bool filtered_product_fits(const Device& device, Dtype weight, const void* factor, i64 stride, i64 m, i64 d) {
  const Hardware& h = hardware(device.index);
  return size_of(weight) == 2 && h.capability >= 80 && h.shared_bytes >= kBytes && d % 8 == 0 && stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(factor) % 16 == 0 && ceil_div(m, kM) * ceil_div(d, kN) >= h.processors / 2;
}

template <class W>
void filtered_rows(const Device& device, const FilteredTile<W>& tile, const W* factor, i64 stride, int d, float* c,
                   i64 c_stride, bool accumulate) {
  run<W, false>(device, tile, factor, stride, d, c, c_stride, accumulate);
}
template <class W>
void filtered_columns(const Device& device, const FilteredTile<W>& tile, const W* factor, i64 stride, int d, float* c,
                      i64 c_stride, bool accumulate) {
  run<W, true>(device, tile, factor, stride, d, c, c_stride, accumulate);
}

template void filtered_rows<bf16>(const Device&, const FilteredTile<bf16>&, const bf16*, i64, int, float*, i64, bool);
template void filtered_rows<f16>(const Device&, const FilteredTile<f16>&, const f16*, i64, int, float*, i64, bool);
template void filtered_columns<bf16>(const Device&, const FilteredTile<bf16>&, const bf16*, i64, int, float*, i64,
                                     bool);
template void filtered_columns<f16>(const Device&, const FilteredTile<f16>&, const f16*, i64, int, float*, i64, bool);

}  // namespace widehead::cuda
