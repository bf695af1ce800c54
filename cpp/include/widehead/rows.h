// rows.h -- some rows of a weight matrix: gather them, step them, and fill a matrix with its first weights
#pragma once
#include <cstdint>

#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead {

// out[i] = weight[rows[i]], bit for bit. Throws ShapeError for shapes or data types that differ, LabelError for a row
// out of range; nothing is written then. On a GPU a row out of range gives zeros, and
// is recorded unless it is -1 (padding).
struct GatherRows {
  ConstAnyMatrix weight;               // [D, d]
  const std::int64_t* rows = nullptr;  // [n] in [0, D)
  std::int64_t n = 0;
  AnyMatrix out;  // [n, d], data type of weight
  Device device = {};
};
void gather_rows(const GatherRows& args);

// The optimiser's step of *update on the rows that have a gradient, with the arithmetic and the random numbers of the
// fused dense_backward: row rows[i] of weight (and of the state, and of bias) moves by grad[i]. All other rows stay as
// they are. Throws before any change: ShapeError, DtypeError; LabelError when rows are out of range or repeat;
// NonFiniteError when a gradient is NaN or infinite. Same bits for any number of threads.
// On a GPU rows must ascend so that repeats are seen; rows of -1 (padding) come last and are passed over.
struct UpdateRows {
  AnyMatrix weight;                    // [D, d] float32 | bfloat16 | float64, on a GPU also float16
  AnyVector bias;                      // [D] or empty
  const std::int64_t* rows = nullptr;  // [n] distinct, in [0, D), in any order
  std::int64_t n = 0;
  ConstAnyMatrix grad;       // [n, d] float32 | bfloat16 | float64, on a GPU also float16
  ConstAnyVector grad_bias;  // [n], given exactly when bias is
  const Update* update = nullptr;
  Device device = {};
};
void update_rows(const UpdateRows& args);
// Bytes of device.scratch that the call wants; 0 on the CPU.
std::int64_t scratch_bytes(const UpdateRows& args);

// Fills `out` with uniform numbers: out(r, c) = low + (high - low) u, with u in [0, 1) the 24-bit draw (row first_row +
// r, index c) of the stream (seed, Purpose::init_weight, step 0), computed in float64 and rounded to nearest. So a
// shard, or rows added later, hold what the whole matrix would. Throws ShapeError unless low <= high are finite;
// DtypeError for other types than float32, bfloat16, float64 (and float16 on a GPU).
void init_uniform(const AnyMatrix& out, double low, double high, std::uint64_t seed, std::int64_t first_row,
                  const Device& device = {});

}  // namespace widehead
