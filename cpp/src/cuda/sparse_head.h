// sparse_head.h -- the sparse head's layer as the parts of the backend take it
#pragma once
#include "cuda/sparse_products.h"
#include "widehead/dense.h"

namespace widehead::cuda {

// Calls f with a W of the weights' type; the head has no float16.
template <class F>
void by_sparse_type(Dtype type, F f) {
  switch (type) {
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bf16{});
    default: return f(float{});
  }
}

// What both heads have, for the code that walks and selects; its weight is [D, K].
inline DenseLayer as_dense(const SparseLayer& layer) {
  DenseLayer out;
  out.hidden = layer.hidden;
  out.weight = layer.weight;
  out.bias = layer.bias;
  return out;
}

template <class W>
SparseWeights<W> weights_of(const SparseLayer& layer, const ConstAnyVector& bias, i64 padded) {
  const ConstAnyMatrix& w = layer.weight;
  const bool aligned = reinterpret_cast<std::uintptr_t>(w.data) % 16 == 0 && w.stride * size_of(w.dtype) % 16 == 0;
  return {static_cast<const W*>(w.data), w.stride, aligned, bias, SparseInputs(layer.index, w.cols, layer.hidden.cols),
          static_cast<int>(padded)};
}

}  // namespace widehead::cuda
