// sparse_turn.cu -- hidden, gradients and dX between rows of examples, as callers have them, and rows to gather from
#include "cuda/intrinsics.h"
#include "cuda/sparse_products.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr i64 kManyBlocks = i64{1} << 20;

// Patches of 32 by 32 through shared memory: read(row, column) along rows, write(column, row, x) along columns.
template <class Real, class Read, class Write>
__device__ inline void turn(i64 rows, i64 columns, Read read, Write write) {
  __shared__ Real patch[32][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const i64 across = ceil_div(columns, 32), n = across * ceil_div(rows, 32);
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 r0 = block / across * 32, c0 = block % across * 32;
    for (int i = warp; i < 32; i += kWarps)
      if (r0 + i < rows && c0 + lane < columns) patch[i][lane] = read(r0 + i, c0 + lane);
    __syncthreads();
    for (int i = warp; i < 32; i += kWarps)
      if (c0 + i < columns && r0 + lane < rows) write(c0 + i, r0 + lane, patch[lane][i]);
    __syncthreads();
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads, 4)
    gather_hidden_kernel(ConstAnyMatrix in, i64 chunk, i64 padded, W* x, bool strict, Report report) {
  using Real = RealOf<W>;
  const i64 rows = ceil_div(in.rows, chunk) * padded;
  turn<Real>(
      rows, in.cols,
      [&](i64 r, i64 h) {
        const i64 within = r % padded, b = r / padded * chunk + within;
        if (within >= chunk || b >= in.rows) return Real{0};
        const Real v = number_at<Real>(in.data, in.dtype, b * in.stride + h);
        const Real kept = static_cast<Real>(to_float(from_float<W>(v)));
        if (strict && !(kept - kept == 0)) report(Fault::non_finite, Argument::hidden, b, 0, 0);
        return kept;
      },
      [&](i64 h, i64 r, Real v) { x[(r / padded * in.cols + h) * padded + r % padded] = from_float<W>(v); });
}

template <class Real, class To>
__global__ void __launch_bounds__(kThreads, 4)
    store_grad_hidden_kernel(const Real* dx, i64 chunk, i64 padded, i64 batch, i64 features, To* out, i64 stride) {
  const i64 chunks = ceil_div(batch, chunk);
  turn<Real>(
      chunks * features, padded, [&](i64 r, i64 b) { return dx[r * padded + b]; },
      [&](i64 within, i64 r, Real v) {
        const i64 b = r / features * chunk + within;
        if (within < chunk && b < batch) out[b * stride + r % features] = from_float<To>(v);
      });
}

template <class W>
__global__ void __launch_bounds__(kThreads, 4)
    turn_gradients_kernel(const W* g, i64 rows, i64 stride, i64 count, i64 padded, W* out) {
  turn<W>(
      padded, count, [&](i64 b, i64 c) { return b < rows ? g[b * stride + c] : W{}; },
      [&](i64 c, i64 b, W v) { out[c * padded + b] = v; });
}

unsigned patches(i64 rows, i64 columns) {
  return blocks_for(ceil_div(rows, 32) * ceil_div(columns, 32), 1, kManyBlocks);
}

}  // namespace

template <class W>
void gather_hidden(const Device& device, const ConstAnyMatrix& hidden, i64 chunk, i64 padded, W* x,
                   const Report* strict) {
  launch(device, patches(ceil_div(hidden.rows, chunk) * padded, hidden.cols), kThreads, 0, gather_hidden_kernel<W>,
         hidden, chunk, padded, x, strict != nullptr, strict ? *strict : Report{});
}

template <class Real>
void store_grad_hidden(const Device& device, const Real* dx, i64 chunk, i64 padded, const AnyMatrix& out) {
  by_float_type(out.dtype, [&](auto to) {
    using To = decltype(to);
    launch(device, patches(ceil_div(out.rows, chunk) * out.cols, padded), kThreads, 0,
           store_grad_hidden_kernel<Real, To>, dx, chunk, padded, out.rows, out.cols, static_cast<To*>(out.data),
           out.stride);
  });
}

template <class W>
void turn_gradients(const Device& device, const W* g, i64 rows, i64 stride, i64 count, i64 padded, W* out) {
  launch(device, patches(padded, count), kThreads, 0, turn_gradients_kernel<W>, g, rows, stride, count, padded, out);
}

template void gather_hidden<float>(const Device&, const ConstAnyMatrix&, i64, i64, float*, const Report*);
template void gather_hidden<double>(const Device&, const ConstAnyMatrix&, i64, i64, double*, const Report*);
template void gather_hidden<bf16>(const Device&, const ConstAnyMatrix&, i64, i64, bf16*, const Report*);
template void store_grad_hidden<float>(const Device&, const float*, i64, i64, const AnyMatrix&);
template void store_grad_hidden<double>(const Device&, const double*, i64, i64, const AnyMatrix&);
template void turn_gradients<float>(const Device&, const float*, i64, i64, i64, i64, float*);
template void turn_gradients<double>(const Device&, const double*, i64, i64, i64, i64, double*);
template void turn_gradients<bf16>(const Device&, const bf16*, i64, i64, i64, i64, bf16*);

}  // namespace widehead::cuda
