// fused_tile.h -- a block's own 128 rows against a stream of 64 rows at a time, on tensor cores
//
//   S = A B'      A [128, d] the block's own rows, B [64, d] the rows that stream by
//   C += f(S) B   with f(S) taken straight from the registers where S lies
//
// As in FlashAttention-2 (arXiv 2307.08691) the accumulators of the first product are the left factor of the second. The
// same code serves examples against classes and classes against examples. d is padded with zeros to kD = 64 or 128. Rows
// lie in shared memory with their 16-byte chunks permuted by the row, so that ldmatrix meets no bank twice.
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/launch.h"

namespace widehead::cuda {

constexpr int kOwnRows = 128, kStreamRows = 64, kStages = 3;

// A matrix in memory: `rows` of d elements at a distance of `stride`.
template <class T>
struct RowsView {
  const T* data;
  i64 rows, stride;
  int d;
};

template <class T, int kD>
struct FusedTile {
  // 32 rows a warp halve the traffic from shared memory; with kD = 128 the registers are enough for 16.
  static constexpr int kRowTiles = kD == 64 ? 2 : 1;
  static constexpr int kThreads = kOwnRows / (16 * kRowTiles) * 32;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kStep = kD == 64 ? 32 : 16;  // columns of S at a time, as the registers allow
  static constexpr int kChunks = kD / 8;
  static constexpr int kOwnElements = kOwnRows * kD, kStageElements = kStreamRows * kD;
  static constexpr int kBytes = (kOwnElements + kStages * kStageElements) * 2;

  using Scores = float[kRowTiles][kStep / 8][4];
  using Sums = float[kRowTiles][kD / 8][4];

  std::uint32_t own[kRowTiles][kD / 16][4];

  __device__ static int place(int row, int chunk) { return row * kD + ((chunk ^ (row & 7)) * 8); }
  // The same for row `eight` + r, with `eight` a multiple of 8: the permutation does not depend on it.
  __device__ static int place(int eight, int r, int chunk) { return (eight + r) * kD + ((chunk ^ r) * 8); }
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  // Row of the block's 128 that holds elements 2 half and 2 half + 1 of a fragment.
  __device__ static int own_row(int tile, int half) {
    return static_cast<int>(threadIdx.x / 32) * 16 * kRowTiles + tile * 16 + lane() / 4 + 8 * half;
  }
  // Column of S, counted from the step's first, that holds element `i` of fragment `n`.
  __device__ static int column(int n, int i) { return n * 8 + lane() % 4 * 2 + i % 2; }

  // Starts copying rows [first, first + kRows) to shared memory; what is not there becomes zero. A thread keeps its
  // chunk, and its rows are a multiple of 8 apart: additions are all that is left of the addresses.
  template <int kRows>
  __device__ static void fetch(T* to, const RowsView<T>& from, i64 first) {
    constexpr int kApart = kThreads / kChunks;
    static_assert(kApart % 8 == 0 && kRows % kApart == 0);
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    const i64 left = chunk * 8 < from.d ? from.rows - first - row : 0;
    const T* at = from.data + (first + row) * from.stride + chunk * 8;
    to += place(row, chunk);
#pragma unroll
    for (int r = 0; r < kRows; r += kApart) {
      const bool there = r < left;
      copy_async16(to + r * kD, there ? at : from.data, there ? 16 : 0);
      at += kApart * from.stride;
    }
  }

  __device__ void load_own(const T* rows) {
    const int matrix = lane() / 8, r = lane() % 8;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        const int row = static_cast<int>(threadIdx.x / 32) * 16 * kRowTiles + t * 16 + matrix % 2 * 8 + r;
        ldmatrix4<false>(own[t][k], rows + place(row, k * 2 + matrix / 2));
      }
  }

  // S for columns [first, first + kStep) of the stream's rows.
  __device__ void score(const T* stream, int first, Scores& s) const {
    const int matrix = lane() / 8, r = lane() % 8;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = 0;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        std::uint32_t b[4];
        ldmatrix4<false>(b, stream + place(first + n * 16 + matrix / 2 * 8, r, k * 2 + matrix % 2));
        const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma<T>(s[t][2 * n], own[t][k], low);
          mma<T>(s[t][2 * n + 1], own[t][k], high);
        }
      }
  }

  // C += S B over those columns.
  __device__ void add_product(const T* stream, int first, const Scores& s, Sums& c) const {
    const int matrix = lane() / 8, r = lane() % 8;
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[t][i] = pack2<T>(s[t][2 * k + i / 2][i % 2 * 2], s[t][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        std::uint32_t b[4];
        ldmatrix4<true>(b, stream + place(first + k * 16 + matrix % 2 * 8, r, n * 2 + matrix / 2));
        const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma<T>(c[t][2 * n], a[t], low);
          mma<T>(c[t][2 * n + 1], a[t], high);
        }
      }
    }
  }

  // f(stage, first) for each kStreamRows rows of [begin, end), `stage` the rows in shared memory. `also(stage number, first)`
  // may start copies of its own along with them; they are there when f is called.
  template <class F, class Also>
  __device__ void walk(T* shared, const RowsView<T>& own_rows, i64 own_first, const RowsView<T>& stream, i64 begin,
                       i64 end, Also also, F f) {
    T* stages = shared + kOwnElements;
    fetch<kOwnRows>(shared, own_rows, own_first);
    const auto next = [](int stage) { return stage + 1 == kStages ? 0 : stage + 1; };
    i64 ahead = begin;
    int filled = 0;
    const auto start = [&] {
      if (ahead < end) {
        fetch<kStreamRows>(stages + filled * kStageElements, stream, ahead);
        also(filled, ahead);
        ahead += kStreamRows;
        filled = next(filled);
      }
      copy_commit();  // an empty group too, so that the count of groups goes with the loop below
    };
    for (int i = 0; i < kStages - 1; ++i) start();
    int stage = 0;
    for (i64 first = begin; first < end; first += kStreamRows) {
      copy_wait<kStages - 2>();
      __syncthreads();  // all have their part of the stage, and are done with the one that is filled next
      if (first == begin) load_own(shared);
      start();
      f(stages + stage * kStageElements, stage, first);
      stage = next(stage);
    }
    copy_wait<0>();
    __syncthreads();
  }
};

}  // namespace widehead::cuda
