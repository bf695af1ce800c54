// bag.h -- embedding bag: the sum of the table's rows that a sparse example names, and the fused step on those rows
//
//   s_b = sum_j value_j table[index_j]        out_b = s_b, or scale s_b / |s_b|
//
// The step writes each touched row once, from one task, in an order fixed by the input: same bits for any number of threads.
#pragma once
#include <cstdint>

#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead {

// Sparse examples, CSR: row b has indices[indptr[b] .. indptr[b + 1]), in any order; repeated indices add up.
struct BagInput {
  const std::int64_t* indptr = nullptr;  // [rows + 1]
  ConstAnyVector indices;                // [nnz] int32 | int64, in [0, table rows)
  const float* values = nullptr;         // [nnz], or null for 1
  std::int64_t rows = 0;

  std::int64_t nnz() const { return rows > 0 ? indptr[rows] : 0; }
};

// The output is unit length times `scale` when `normalise`; the sum of no rows stays 0 and takes no gradient.
struct BagForward {
  BagInput input;
  ConstAnyMatrix table;  // [V, d] float32 | bfloat16 | float64, V < 2^31
  bool normalise = false;
  double scale = 1.0;
  AnyMatrix out;         // [B, d] float32 (float64 with a float64 table)
  AnyVector norms = {};  // [B] |s_b|, as out; BagStep wants it when `normalise`
};
// Throws ShapeError, DtypeError; LabelError for an index out of range.
void bag_forward(const BagForward& args);

// With G = dL/ds (from dL/dout, exactly) the rows get the gradient sum_b value G_b and the optimiser's step. All optimisers
// are lazy: rows that no example names keep their weights and their state, decay included. Momentum is refused.
struct BagStep {
  BagInput input;
  AnyMatrix table;  // [V, d]
  bool normalise = false;
  double scale = 1.0;
  ConstAnyMatrix out = {};    // [B, d] from bag_forward with the same table; when `normalise`
  ConstAnyVector norms = {};  // [B] likewise
  ConstAnyMatrix grad;        // [B, d] dL/dout, dtype as out
  const Update* update = nullptr;
};
// Throws as bag_forward, and NonFiniteError for a gradient or a value that is NaN or infinite; always before any change.
void bag_step(const BagStep& args);

}  // namespace widehead
