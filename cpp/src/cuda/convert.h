// convert.h -- numbers whose type is known at run time: an element as the arithmetic's type, hidden in the weight's type
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/cublas.h"
#include "cuda/intrinsics.h"
#include "cuda/launch.h"
#include "widehead/view.h"

namespace widehead::cuda {

// What products of W are summed in.
template <class W>
using RealOf = std::conditional_t<std::is_same_v<W, double>, double, float>;

// Calls f with a W of the type that `type` names.
template <class F>
void by_float_type(Dtype type, F f) {
  switch (type) {
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    default: return f(float{});
  }
}

template <class Real>
__device__ inline Real number_at(const void* data, Dtype type, i64 i) {
  switch (type) {
    case Dtype::f64: return static_cast<Real>(static_cast<const double*>(data)[i]);
    case Dtype::bf16: return static_cast<Real>(to_float(static_cast<const bf16*>(data)[i]));
    case Dtype::f16: return static_cast<Real>(to_float(static_cast<const f16*>(data)[i]));
    default: return static_cast<Real>(static_cast<const float*>(data)[i]);
  }
}

// 0 where the layer has no bias.
template <class Real>
__device__ inline Real bias_at(const ConstAnyVector& bias, i64 c) {
  return bias.data ? number_at<Real>(bias.data, bias.dtype, c) : Real{0};
}

// to = from, rounded to nearest; the same shape, any floating types.
void convert_matrix(const Device& device, const ConstAnyMatrix& from, const AnyMatrix& to);

// out [rows, stride] = in [rows, cols], zeros behind.
template <class W>
__global__ void convert_rows(ConstAnyMatrix in, i64 rows, W* out, i64 stride) {
  const i64 n = rows * stride, step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const i64 r = i / stride, c = i % stride;
    out[i] = from_float<W>(c < in.cols ? number_at<RealOf<W>>(in.data, in.dtype, r * in.stride + c) : RealOf<W>{0});
  }
}

// Elements from row to row of converted rows, which so begin at multiples of 16 bytes.
inline i64 converted_stride(i64 cols, Dtype type) { return round_up(cols, 16 / size_of(type)); }

// Room for `rows` rows of hidden in the weight's type; null where it has that type already.
inline void* take_converted(Scratch& scratch, const ConstAnyMatrix& hidden, i64 rows, Dtype type) {
  if (hidden.dtype == type) return nullptr;
  return scratch.take<char>(rows * converted_stride(hidden.cols, type) * size_of(type));
}

// Rows [first, first + rows) of hidden as a factor of products in the type: where they lie if they have it, else
// converted into `room`.
inline Operand as_factor(const Device& device, const ConstAnyMatrix& hidden, i64 first, i64 rows, Dtype type,
                         void* room) {
  ConstAnyMatrix in = hidden;
  in.data = static_cast<const char*>(in.data) + first * in.stride * size_of(in.dtype);
  if (in.dtype == type) return {in.data, in.stride};
  const i64 stride = converted_stride(in.cols, type);
  by_float_type(type, [&](auto w) {
    launch(device, blocks_for(rows * stride, 1024), 256, 0, convert_rows<decltype(w)>, in, rows,
           static_cast<decltype(w)*>(room), stride);
  });
  return {room, stride};
}

}  // namespace widehead::cuda
