// fault.h -- what a call on a GPU cannot throw
//
// A call on a GPU only enqueues work: values are seen on the device, long after the call has returned. A bad one is
// recorded in device memory of the caller's, the step that met it changes nothing, and the error is thrown when the
// caller copies the record back and hands it to raise_fault.
#pragma once
#include <cstdint>

namespace widehead {

enum class Fault : std::int64_t {
  none,
  label_range,     // a class outside [0, limit)
  label_repeated,  // a class twice in one row
  row_pointer,     // a CSR row pointer that decreases, or points past the `limit` indices
  label_weight,    // a label's weight that is not finite
  row_range,       // a row or class outside [0, limit)
  row_repeated,    // a row twice
  non_finite,
  row_order,    // a row below the one before it, `limit`, or after padding
  index_range,  // an input of a sparse layer outside [0, limit)
  index_order,  // one that is not above the one before it, `limit`
  stale_batch,  // a batch of the exact head from before a step, or without its gradient
  log_full,     // the exact head has taken `value` steps of `limit` since its rows were brought together
};

enum class Argument : std::int64_t {
  target,
  hidden,
  lse,
  grad_losses,
  grad_output,
  grad_lse,
  classes,
  rows,
  grad,
  grad_bias,
  exclude,
  index,
  batch,
  weight,
  velocity,
  grad_A,
  grad_q,
  grad_s,
  lr,
  grad_scale,
  column_scale,
};
const char* name_of(Argument argument);

// The first fault since the record was cleared; all zero: none. `position` is a row, or a place in the indices.
struct FaultRecord {
  std::int64_t fault = 0;
  std::int64_t argument = 0;
  std::int64_t position = 0;
  std::int64_t value = 0;
  std::int64_t limit = 0;
};

// Throws LabelError, NonFiniteError or ShapeError that says what the record says; returns when it says nothing.
void raise_fault(const FaultRecord& record);

}  // namespace widehead
