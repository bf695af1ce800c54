// exact_device.cc -- checks the arguments of the exact head on a GPU; their values are checked there
#include "widehead/exact_device.h"

#include <limits>

#include "cuda/backend.h"
#include "exact_check.h"
#include "head_check.h"
#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::to_string;

void expect_gpu(const Device& device) {
  if (!on_gpu(device)) throw BackendError("device: expected a GPU; on the CPU the exact head is an ExactHead");
}

void check_rows(const ExactDevice& head) {
  expect_gpu(head.device);
  check_exact_rows(head.weight, head.velocity);
  if (head.weight.rows > std::numeric_limits<std::uint32_t>::max())
    throw ShapeError("weight: expected at most 2^32 - 1 classes on a GPU, got " + to_string(head.weight.rows));
}

void check_memory(const char* name, const void* at, int64_t got, int64_t expected) {
  if (!at || got < expected)
    throw ShapeError(std::string(name) + ": expected at least " + to_string(expected) + " bytes, got " +
                     to_string(at ? got : 0));
  if (reinterpret_cast<std::uintptr_t>(at) % 256)
    throw ShapeError(std::string(name) + ": expected memory aligned to 256 bytes");
}

void check_head(const ExactDevice& head) {
  check_rows(head);
  check_memory("state", head.state, head.state_bytes, cuda::exact_state_bytes(head));
}

void check_counts(int64_t examples, int64_t targets) {
  constexpr int64_t kMost = std::numeric_limits<std::int32_t>::max() - 1;
  if (examples < 0 || examples > 2097120)  // what a grid's second dimension reaches
    throw ShapeError("hidden: expected at most 2097120 examples, got " + to_string(examples));
  if (targets < 0 || targets > kMost)
    throw ShapeError("target: expected at most " + to_string(kMost) + " targets, got " + to_string(targets));
}

template <class Args>
void check_batch(const Args& args, int64_t examples, int64_t targets) {
  check_head(args.head);
  check_counts(examples, targets);
  check_memory("batch", args.batch, args.batch_bytes, cuda::exact_batch_bytes(args.head, examples, targets));
}

int64_t targets_of(const Labels& target) { return target.indptr ? target.size : target.rows; }

}  // namespace

int64_t exact_state_bytes(const ExactDevice& head) {
  check_rows(head);
  return cuda::exact_state_bytes(head);
}

int64_t exact_batch_bytes(const ExactDevice& head, int64_t examples, int64_t targets) {
  check_rows(head);
  check_counts(examples, targets);
  return cuda::exact_batch_bytes(head, examples, targets);
}

void exact_init(const ExactDevice& head) {
  check_head(head);
  cuda::exact_init(head);
}
int64_t exact_init_scratch(const ExactDevice& head) {
  check_rows(head);
  return cuda::exact_init_scratch(head);
}

void exact_forward(const ExactForward& args) {
  check_batch(args, args.hidden.rows, targets_of(args.target));
  expect_dtype("hidden", args.hidden.dtype, floating(args.hidden.dtype), "float32, bfloat16, float16 or float64");
  expect_shape("hidden", args.hidden, args.hidden.rows, args.head.weight.cols);
  check_exact_target(args.target, args.hidden.rows, args.head.weight.rows);
  cuda::exact_forward(args);
}
int64_t scratch_bytes(const ExactForward&) { return 0; }

void exact_backward(const ExactBackward& args) {
  check_batch(args, args.examples, args.targets);
  if (args.grad_hidden) {
    expect_shape("grad_hidden", args.grad_hidden, args.examples, args.head.weight.cols);
    expect_dtype("grad_hidden", args.grad_hidden.dtype, floating(args.grad_hidden.dtype), "a floating type");
  }
  cuda::exact_backward(args);
}

void exact_gradient(const ExactGradient& args) {
  check_batch(args, args.examples, args.targets);
  cuda::exact_gradient(args);
}
int64_t scratch_bytes(const ExactGradient& args) {
  check_batch(args, args.examples, args.targets);
  return cuda::scratch_bytes(args);
}

void exact_step(const ExactDeviceStep& args) {
  check_batch(args, args.examples, args.targets);
  check_exact_step(args.lr, args.weight_decay, args.momentum, static_cast<bool>(args.head.velocity));
  cuda::exact_step(args);
}
int64_t scratch_bytes(const ExactDeviceStep& args) {
  check_batch(args, args.examples, args.targets);
  return cuda::scratch_bytes(args);
}

void exact_rows(const ExactRows& args) {
  check_head(args.head);
  expect_shape("out", args.out, args.n, args.head.weight.cols);
  expect_dtype("out", args.out.dtype, floating(args.out.dtype), "a floating type");
  cuda::exact_rows(args);
}
int64_t scratch_bytes(const ExactRows& args) {
  check_rows(args.head);
  return cuda::scratch_bytes(args);
}

void exact_consolidate(const ExactDevice& head) {
  check_head(head);
  cuda::exact_consolidate(head);
}
int64_t exact_consolidate_scratch(const ExactDevice& head) {
  check_rows(head);
  return cuda::exact_consolidate_scratch(head);
}

void exact_gram(const ExactDevice& head, double* squares, double* sums) {
  check_head(head);
  cuda::exact_gram(head, squares, sums);
}
void exact_diagnostics(const ExactDevice& head, double* numbers) {
  check_head(head);
  cuda::exact_diagnostics(head, numbers);
}

void spherical_loss(const SphericalLossDevice& args) {
  expect_gpu(args.device);
  check_spherical(args.options);
  cuda::spherical_loss(args);
}
int64_t scratch_bytes(const SphericalLossDevice& args) { return cuda::scratch_bytes(args); }

}  // namespace widehead
