// sparse_groups.cu -- groups of classes that share their inputs, as small dense products on tensor cores
//
//   Z = W X'   dW = G' X   dX' = W' G'    with W [classes, inputs] of a group, X' [inputs, examples] gathered
//
// A block takes up to 64 classes (for dX': inputs) and 64 examples (for dW: inputs) of one group. Its two factors pass
// through shared memory 64 deep; two warps share 16 rows of the result.
#include "cuda/intrinsics.h"
#include "cuda/sparse_groups.h"

namespace widehead::cuda {
namespace {

constexpr int kSide = 64;   // of a factor in shared memory
constexpr int kPitch = 72;  // elements from row to row there, so that ldmatrix meets no bank twice
constexpr i64 kManyBlocks = i64{1} << 20;

template <class W>
using Factor = W[kSide * kPitch];

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

// A group's classes within the tile.
struct Group {
  i64 row;         // of the index
  i64 begin, end;  // classes
};
__device__ inline Group group_at(const TileGroups& t, i64 size, i64 i) {
  const i64 row = t.first_group + i;
  return {row, at_least(t.first, row * size), at_most(t.first + t.count, (row + 1) * size)};
}

// Rows of `columns` elements that begin at multiples of 16 bytes; row(i) may be null: zeros.
template <class W, class Row>
__device__ inline void load_rows(W* to, int rows, int columns, Row row) {
  const int across = columns / 8;
  for (int i = static_cast<int>(threadIdx.x); i < rows * across; i += static_cast<int>(blockDim.x)) {
    const int r = i / across, piece = i % across;
    const W* from = row(r);
    uint4 v = make_uint4(0, 0, 0, 0);
    if (from) v = *reinterpret_cast<const uint4*>(from + piece * 8);
    *reinterpret_cast<uint4*>(to + r * kPitch + piece * 8) = v;
  }
}

// weight[c0 .., k0 ..], `classes` by `inputs` of it; zeros up to rows by columns.
template <class W>
__device__ inline void load_weights(W* to, const SparseWeights<W>& s, i64 c0, int classes, int rows, i64 k0, int inputs,
                                    int columns) {
  const W* from = s.weight + c0 * s.stride + k0;
  if (s.aligned && inputs == columns)
    return load_rows(to, rows, columns, [&](int r) { return r < classes ? from + r * s.stride : nullptr; });
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += static_cast<int>(blockDim.x)) {
    const int r = i / columns, k = i % columns;
    to[r * kPitch + k] = r < classes && k < inputs ? from[r * s.stride + k] : W{};
  }
}

// What a warp adds to its 16 rows: kN fragments of 8 columns, over `depth` (a multiple of 16). A lies in rows of the
// result, or, kTurnedA, of the depth; B in rows of the result's columns, or, kTurnedB, of the depth.
template <bool kTurnedA, bool kTurnedB, int kN, class W>
__device__ inline void multiply(float (&sum)[kN][4], const W* a, const W* b, int row, int column, int depth) {
  const int q = lane_of() / 8, r = lane_of() % 8, low = 8 * (q & 1), high = 8 * (q >> 1);
  for (int d = 0; d < depth; d += 16) {
    std::uint32_t fa[4];
    ldmatrix4<kTurnedA>(fa,
                        kTurnedA ? a + (d + r + high) * kPitch + row + low : a + (row + r + low) * kPitch + d + high);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t fb[4];
      const int c = column + n * 8;
      ldmatrix4<kTurnedB>(fb, kTurnedB ? b + (d + r + low) * kPitch + c + high : b + (c + r + high) * kPitch + d + low);
      const std::uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
      mma<W>(sum[n], fa, left);
      mma<W>(sum[n + 1], fa, right);
    }
  }
}

// f(row, column, value) for every element of the warp's fragments.
template <int kN, class F>
__device__ inline void each_element(const float (&sum)[kN][4], int row, int column, F f) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f(row + lane_of() / 4 + i / 2 * 8, column + n * 8 + lane_of() % 4 * 2 + i % 2, sum[n][i]);
}

__device__ inline int up16(i64 n) { return static_cast<int>(round_up(n, 16)); }

template <class W, int kExamples>
__global__ void __launch_bounds__(256)
    logits_kernel(SparseWeights<W> s, TileGroups t, i64 parts, const W* x, i64 rows, float* z, i64 z_stride) {
  alignas(16) __shared__ Factor<W> a;
  alignas(16) __shared__ Factor<W> b;
  constexpr int kN = kExamples / 16;
  const int row = warp_of() / 2 * 16, column = warp_of() % 2 * kExamples / 2, room = static_cast<int>(blockDim.x) / 4;
  const i64 fan_in = s.inputs.fan_in, items = t.groups * parts, n = items * ceil_div(rows, kExamples);
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 b0 = block / items * kExamples;
    const Group group = group_at(t, s.inputs.group_size, block % items / parts);
    const i64 c0 = group.begin + block % items % parts * kSide;
    const int classes = static_cast<int>(at_most(kSide, group.end - c0));
    if (classes <= 0) continue;
    float sum[kN][4] = {};
    for (i64 k0 = 0; k0 < fan_in; k0 += kSide) {
      const int inputs = static_cast<int>(at_most(kSide, fan_in - k0)), depth = up16(inputs);
      __syncthreads();  // the last factors are still being read
      load_weights(a, s, c0, classes, room, k0, inputs, depth);
      load_rows(b, depth, kExamples, [&](int r) {
        return r < inputs ? x + static_cast<i64>(s.inputs.of_row(group.row, k0 + r)) * s.padded + b0 : nullptr;
      });
      __syncthreads();
      multiply<false, true>(sum, a, b, row, column, depth);
    }
    each_element(sum, row, column, [&](int c, int e, float v) {
      if (c < classes && b0 + e < rows) z[(b0 + e) * z_stride + c0 - t.first + c] = v + bias_at<float>(s.bias, c0 + c);
    });
  }
}

// `halves` warps share 16 classes: 32 inputs each.
template <class W, int kExamples>
__global__ void __launch_bounds__(256)
    grad_weight_kernel(SparseWeights<W> s, TileGroups t, i64 parts, int halves, const W* x, const W* g, float* to,
                       i64 to_stride, bool accumulate) {
  alignas(16) __shared__ Factor<W> a;
  alignas(16) __shared__ Factor<W> b;
  const int row = warp_of() / halves * 16, column = warp_of() % halves * 32,
            room = static_cast<int>(blockDim.x) / halves / 2;
  const i64 fan_in = s.inputs.fan_in, across = ceil_div(fan_in, kSide), n = t.groups * parts * across;
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 k0 = block % across * kSide, item = block / across;
    const Group group = group_at(t, s.inputs.group_size, item / parts);
    const i64 c0 = group.begin + item % parts * kSide;
    const int classes = static_cast<int>(at_most(kSide, group.end - c0));
    const int inputs = static_cast<int>(at_most(kSide, fan_in - k0));
    if (classes <= 0) continue;
    float sum[4][4] = {};
    for (int b0 = 0; b0 < s.padded; b0 += kExamples) {
      __syncthreads();
      load_rows(a, room, kExamples,
                [&](int r) { return r < classes ? g + (c0 - t.first + r) * s.padded + b0 : nullptr; });
      load_rows(b, 32 * halves, kExamples, [&](int r) {
        return r < inputs ? x + static_cast<i64>(s.inputs.of_row(group.row, k0 + r)) * s.padded + b0 : nullptr;
      });
      __syncthreads();
      multiply<false, false>(sum, a, b, row, column, kExamples);
    }
    each_element(sum, row, column, [&](int c, int k, float v) {
      if (c >= classes || k >= inputs) return;
      float* at = to + (c0 - t.first + c) * to_stride + k0 + k;
      *at = accumulate ? *at + v : v;
    });
  }
}

// The result's rows are inputs.
template <class W, int kExamples>
__global__ void __launch_bounds__(256) grad_hidden_kernel(SparseWeights<W> s, TileGroups t, const W* g, float* out) {
  alignas(16) __shared__ Factor<W> a;
  alignas(16) __shared__ Factor<W> b;
  constexpr int kN = kExamples / 16;
  const int row = warp_of() / 2 * 16, column = warp_of() % 2 * kExamples / 2, room = static_cast<int>(blockDim.x) / 4;
  const i64 fan_in = s.inputs.fan_in, across = ceil_div(fan_in, kSide), items = t.groups * across;
  const i64 n = items * (s.padded / kExamples);
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 b0 = block / items * kExamples, i = block % items / across, k0 = block % items % across * kSide;
    const Group group = group_at(t, s.inputs.group_size, i);
    const int inputs = static_cast<int>(at_most(kSide, fan_in - k0));
    float sum[kN][4] = {};
    for (i64 c0 = group.begin; c0 < group.end; c0 += kSide) {
      const int classes = static_cast<int>(at_most(kSide, group.end - c0)), depth = up16(classes);
      __syncthreads();
      load_weights(a, s, c0, classes, depth, k0, inputs, room);
      load_rows(b, depth, kExamples,
                [&](int r) { return r < classes ? g + (c0 - t.first + r) * s.padded + b0 : nullptr; });
      __syncthreads();
      multiply<true, true>(sum, a, b, row, column, depth);
    }
    each_element(sum, row, column, [&](int k, int e, float v) {
      if (k < inputs) out[(i * fan_in + k0 + k) * s.padded + b0 + e] = v;
    });
  }
}

template <class F>
void by_examples(int padded, F f) {
  if (padded % 64 == 0) return f(std::integral_constant<int, 64>{});
  f(std::integral_constant<int, 32>{});
}

// Fragments of 16 rows that a block needs for n of them, at most 64.
unsigned fragments(i64 n) { return static_cast<unsigned>(ceil_div(at_most(kSide, n), 16)); }
// Blocks that a group's classes in the tile take.
template <class W>
i64 parts_of(const SparseWeights<W>& s, i64 count) {
  return ceil_div(at_most(s.inputs.group_size, count), kSide);
}

}  // namespace

template <class W>
void group_logits(const Device& device, const SparseWeights<W>& s, const W* x, i64 rows, i64 first, i64 count, float* z,
                  i64 z_stride) {
  const TileGroups t(first, count, s.inputs.group_size);
  const i64 parts = parts_of(s, count);
  by_examples(s.padded, [&](auto examples) {
    constexpr int kExamples = decltype(examples)::value;
    launch(device, blocks_for(t.groups * parts * ceil_div(rows, kExamples), 1, kManyBlocks),
           64 * fragments(s.inputs.group_size), 0, logits_kernel<W, kExamples>, s, t, parts, x, rows, z, z_stride);
  });
}

template <class W>
void group_grad_weight(const Device& device, const SparseWeights<W>& s, const W* x, const W* g, i64 first, i64 count,
                       float* to, i64 to_stride, bool accumulate) {
  const TileGroups t(first, count, s.inputs.group_size);
  const i64 parts = parts_of(s, count), across = ceil_div(static_cast<i64>(s.inputs.fan_in), kSide);
  const int halves = s.inputs.fan_in <= 32 ? 1 : 2;
  by_examples(s.padded, [&](auto examples) {
    launch(device, blocks_for(t.groups * parts * across, 1, kManyBlocks),
           32 * static_cast<unsigned>(halves) * fragments(s.inputs.group_size), 0,
           grad_weight_kernel<W, decltype(examples)::value>, s, t, parts, halves, x, g, to, to_stride, accumulate);
  });
}

template <class W>
void group_grad_hidden(const Device& device, const SparseWeights<W>& s, const W* g, i64 first, i64 count, float* out) {
  const TileGroups t(first, count, s.inputs.group_size);
  const i64 fan_in = s.inputs.fan_in;
  by_examples(s.padded, [&](auto examples) {
    constexpr int kExamples = decltype(examples)::value;
    launch(device, blocks_for(t.groups * ceil_div(fan_in, kSide) * (s.padded / kExamples), 1, kManyBlocks),
           64 * fragments(fan_in), 0, grad_hidden_kernel<W, kExamples>, s, t, g, out);
  });
}

template void group_logits<bf16>(const Device&, const SparseWeights<bf16>&, const bf16*, i64, i64, i64, float*, i64);
template void group_grad_weight<bf16>(const Device&, const SparseWeights<bf16>&, const bf16*, const bf16*, i64, i64,
                                      float*, i64, bool);
template void group_grad_hidden<bf16>(const Device&, const SparseWeights<bf16>&, const bf16*, i64, i64, float*);

}  // namespace widehead::cuda
