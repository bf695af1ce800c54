// convert.h -- elements of types known at run time
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/launch.h"

namespace widehead::cuda {

// Element `at` of a vector of any floating type.
template <class Real>
__device__ inline Real element_as(const void* data, Dtype dtype, i64 at) {
  switch (dtype) {
    case Dtype::f64: return static_cast<Real>(static_cast<const double*>(data)[at]);
    case Dtype::bf16: return static_cast<Real>(to_float(static_cast<const bf16*>(data)[at]));
    case Dtype::f16: return static_cast<Real>(to_float(static_cast<const f16*>(data)[at]));
    default: return static_cast<Real>(static_cast<const float*>(data)[at]);
  }
}

template <class Real>
__device__ inline Real bias_at(const void* bias, Dtype dtype, i64 c) {
  return element_as<Real>(bias, dtype, c);
}

// to = from, rounded to nearest; the same shape, any floating types.
void convert_rows(const Device& device, const ConstAnyMatrix& from, const AnyMatrix& to);

}  // namespace widehead::cuda
