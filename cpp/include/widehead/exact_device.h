// exact_device.h -- the exact head's blocked method on a GPU: functions over memory of the caller's
//
// See exact.h for what it computes. Here a block is one step, and everything that a step depends on, the number of
// steps too, lies in `state`: calls only enqueue work, all steps enqueue the same, and a graph that captured a step can
// be replayed. Shapes and data types are refused at once; bad values are recorded in device.faults, and no step with
// them changes anything. Results are the same bits every time. Calls for one state go to one stream.
#pragma once
#include <cstdint>
#include <limits>

#include "widehead/exact.h"

namespace widehead {

// Between calls of exact_consolidate the rows are a factor of W (and of the velocities), not W.
struct ExactDevice {
  AnyMatrix weight = {};    // [D, d] float32 | float64
  AnyMatrix velocity = {};  // the same, for momentum; or empty
  bool wide = false;        // products in float64 beside float32 rows
  void* state = nullptr;  // aligned to 256 bytes, zero before exact_init; its first int64: steps since the rows were W
  std::int64_t state_bytes = 0;
  Device device = {};
};
// Bytes of state for D classes; looks at the shapes and data types of weight and velocity only.
std::int64_t exact_state_bytes(const ExactDevice& head);
// Bytes of what a batch of so many examples and targets keeps from exact_forward to exact_step.
std::int64_t exact_batch_bytes(const ExactDevice& head, std::int64_t examples, std::int64_t targets);

// Makes the state of rows that are W, velocities that are velocities: before the first call, and after the caller has
// written to consolidated rows; whatever device.refused says. One pass over them.
void exact_init(const ExactDevice& head);
std::int64_t exact_init_scratch(const ExactDevice& head);

struct ExactForward {
  ExactDevice head = {};
  ConstAnyMatrix hidden = {};                                            // [B, d] any floating dtype
  Labels target = {};                                                    // values are not looked at
  std::int64_t ignore_index = std::numeric_limits<std::int64_t>::min();  // of single labels: no target
  void* batch = nullptr;  // aligned to 256 bytes; holds what the calls below want
  std::int64_t batch_bytes = 0;
  double* A = nullptr;  // [nnz]; NaN in rows with a bad label or none
  double* q = nullptr;  // [B]
  double* s = nullptr;  // [B]
};
void exact_forward(const ExactForward& args);
std::int64_t scratch_bytes(const ExactForward& args);

// Takes the derivatives by A [nnz], q [B] and s [B] into the batch, in the place of those of an earlier call. Once a batch
// was refused, it stays so.
struct ExactBackward {
  ExactDevice head = {};
  void* batch = nullptr;
  std::int64_t batch_bytes = 0;
  std::int64_t examples = 0, targets = 0;  // of the batch
  const double* grad_A = nullptr;
  const double* grad_q = nullptr;
  const double* grad_s = nullptr;
  AnyMatrix grad_hidden = {};  // [B, d] any floating dtype, or empty
};
void exact_backward(const ExactBackward& args);

// Of the batch's gradient G [D, d]: |G|^2 [1] and the mean squares of its columns [d], each or null.
struct ExactGradient {
  ExactDevice head = {};
  void* batch = nullptr;
  std::int64_t batch_bytes = 0;
  std::int64_t examples = 0, targets = 0;
  double* norm2 = nullptr;
  double* columns = nullptr;
};
void exact_gradient(const ExactGradient& args);
std::int64_t scratch_bytes(const ExactGradient& args);

// One SGD step by the batch's gradient. Nothing changes if the batch or its gradient was refused, if device.refused is
// set, or if the weights have taken a step since the batch's forward pass; nor with lr 0 and no velocities.
struct ExactDeviceStep {
  ExactDevice head = {};
  void* batch = nullptr;
  std::int64_t batch_bytes = 0;
  std::int64_t examples = 0, targets = 0;
  double lr = 0.0;
  double weight_decay = 0.0;             // coupled, as torch.optim.SGD
  double momentum = 0.0;                 // heavy ball; needs velocities
  const float* device_lr = nullptr;      // [1] in the place of lr
  const double* grad_scale = nullptr;    // [1] multiplies the gradient, or null
  const double* column_scale = nullptr;  // [d] factors of the gradient's columns, or null
};
void exact_step(const ExactDeviceStep& args);
std::int64_t scratch_bytes(const ExactDeviceStep& args);

// Rows of W as they are now; of an id out of range NaN.
struct ExactRows {
  ExactDevice head = {};
  const std::int64_t* ids = nullptr;  // [n]
  std::int64_t n = 0;
  AnyMatrix out = {};  // [n, d] any floating dtype
};
void exact_rows(const ExactRows& args);
std::int64_t scratch_bytes(const ExactRows& args);

// Rewrites the rows so that they are W (and the velocities), whatever device.refused says; one pass over them.
void exact_consolidate(const ExactDevice& head);
std::int64_t exact_consolidate_scratch(const ExactDevice& head);

// W'W [width, width] and W'1 [width] as the state has them, width d, or 2 d with velocities; either may be null.
void exact_gram(const ExactDevice& head, double* squares, double* sums);
// Numbers as double: steps since the rows were W, steps since exact_init, matrices of the log, rows fetched by steps,
// rows that the log has multiplied, |W|^2.
constexpr std::int64_t kExactDiagnostics = 6;
void exact_diagnostics(const ExactDevice& head, double* numbers);

// spherical_loss of exact.h on a GPU; the losses and derivatives of rows with a bad label are NaN.
struct SphericalLossDevice {
  SphericalOptions options = {};
  Labels target = {};
  const double* A = nullptr;
  const double* q = nullptr;
  const double* s = nullptr;
  double* losses = nullptr;
  double* grad_A = nullptr;
  double* grad_q = nullptr;
  double* grad_s = nullptr;
  Device device = {};
  std::int64_t ignore_index = std::numeric_limits<std::int64_t>::min();  // as of ExactForward
};
void spherical_loss(const SphericalLossDevice& args);
std::int64_t scratch_bytes(const SphericalLossDevice& args);

}  // namespace widehead
