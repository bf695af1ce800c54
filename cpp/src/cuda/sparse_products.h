// sparse_products.h -- the sparse head's products on a tile of classes, whose factors are gathered, on a GPU
//
// Everything that is gathered has the batch in its rows: X' [features, padded], G' [classes, padded], dX' [features,
// padded], with `padded` examples, zeros behind the chunk's. One input of one class is then a few whole sectors of memory.
#pragma once
#include "cuda/convert.h"
#include "cuda/fault.h"
#include "cuda/launch.h"
#include "cuda/sparse_lists.h"
#include "widehead/sparse.h"

namespace widehead::cuda {

// Examples of a row for so many: multiples of what a warp's pass takes.
inline i64 padded_examples(i64 examples) { return examples <= 32 ? 32 : round_up(examples, 64); }

// Weights and inputs of the classes as the kernels take them.
template <class W>
struct SparseWeights {
  const W* weight;
  i64 stride;
  bool aligned;         // rows of weights begin at multiples of 16 bytes
  ConstAnyVector bias;  // added to logits where it is given
  SparseInputs inputs;
  int padded;
};

// X' [chunks][features, padded] of hidden, `chunk` examples a part; reports NaN and infinities if `strict`.
template <class W>
void gather_hidden(const Device& device, const ConstAnyMatrix& hidden, i64 chunk, i64 padded, W* x,
                   const Report* strict);
// grad_hidden of dX' [chunks][features, padded].
template <class Real>
void store_grad_hidden(const Device& device, const Real* dx, i64 chunk, i64 padded, const AnyMatrix& out);
// G' [count, padded] of G [rows, stride].
template <class W>
void turn_gradients(const Device& device, const W* g, i64 rows, i64 stride, i64 count, i64 padded, W* out);

// z[b, c] = sum_k weight[first + c, k] X'[input(first + c, k), b] for c < count, b < rows.
template <class W>
void gather_logits(const Device& device, const SparseWeights<W>& s, const W* x, i64 rows, i64 first, i64 count,
                   RealOf<W>* z, i64 z_stride);
// to[c, k] = sum_b G'[c, b] X'[input(first + c, k), b], or adds it.
template <class W>
void gather_grad_weight(const Device& device, const SparseWeights<W>& s, const W* x, const W* g, i64 first, i64 count,
                        RealOf<W>* to, i64 to_stride, bool accumulate);
// dX'[h, b] += the sum over h's list of weight[first + c, k] G'[c, b].
template <class W>
void gather_grad_hidden(const Device& device, const SparseWeights<W>& s, const ListView& lists, const W* g, i64 first,
                        RealOf<W>* dx);
// The same with entries that are rows of `g` [., padded].
void gather_rows_of_groups(const Device& device, const ListView& lists, const float* g, i64 padded, float* dx);

}  // namespace widehead::cuda
