// exact.cc -- checks what the exact head is given before anything of its state changes
#include "widehead/exact.h"

#include <cmath>
#include <limits>

#include "check.h"
#include "cpu/exact_core.h"
#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::to_string;

void check_numbers(const char* name, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(x[i])) throw NonFiniteError(std::string(name) + ": not finite at position " + to_string(i));
}

void check_ids(const char* name, const int64_t* ids, int64_t n, int64_t classes) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= classes)
      throw LabelError(std::string(name) + ": expected a class in [0, " + to_string(classes) + "), got " +
                       to_string(ids[i]) + " at position " + to_string(i));
}

}  // namespace

const char* name_of(ExactMethod method) { return method == ExactMethod::blocked ? "blocked" : "woodbury"; }

ExactHead::ExactHead(AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options) {
  const bool real = weight.dtype == Dtype::f32 || weight.dtype == Dtype::f64;
  expect_dtype("weight", weight.dtype, real, "float32 or float64");
  expect_shape("weight", weight, weight.rows, weight.cols);
  if (weight.rows < 1 || weight.cols < 1)
    throw ShapeError("weight: expected at least one class and one feature, got shape " + shape(weight));
  check_finite(weight, "weight");
  if (velocity) {
    expect_shape("velocity", velocity, weight.rows, weight.cols);
    expect_dtype("velocity", velocity.dtype, velocity.dtype == weight.dtype, name_of(weight.dtype));
    check_finite(velocity, "velocity");
  }
  if (options.block_steps < 1)
    throw ShapeError("block_steps: expected at least 1, got " + to_string(options.block_steps));
  if (options.radix < 2) throw ShapeError("radix: expected at least 2, got " + to_string(options.radix));
  check_option("max_kappa", options.max_kappa, options.max_kappa > 1, "a number > 1");
  if (velocity && options.method == ExactMethod::woodbury)
    throw ShapeError("velocity: expected none with method 'woodbury', which has no momentum; 'blocked' has");
  core_ = cpu::make_exact(weight, velocity, options);
}
ExactHead::~ExactHead() = default;
ExactHead::ExactHead(ExactHead&&) noexcept = default;
ExactHead& ExactHead::operator=(ExactHead&&) noexcept = default;

std::shared_ptr<ExactBatch> ExactHead::forward(const ConstAnyMatrix& hidden, const Labels& target, bool train,
                                               double* A, double* q, double* s) {
  expect_dtype("hidden", hidden.dtype, floating(hidden.dtype), "float32, bfloat16, float16 or float64");
  expect_shape("hidden", hidden, hidden.rows, core_->features);
  check_finite(hidden, "hidden");
  if (target.rows != hidden.rows)
    throw ShapeError("target: expected " + to_string(hidden.rows) + " rows as in hidden, got " +
                     to_string(target.rows));
  if (target.n_classes != core_->classes)
    throw ShapeError("target: is over " + to_string(target.n_classes) + " classes, the weights over " +
                     to_string(core_->classes));
  if (!target.indptr) check_ids("target", target.indices, target.rows, core_->classes);  // none is ignored
  check_labels(target, std::numeric_limits<int64_t>::min(), "target");
  return core_->forward(hidden, target, train, A, q, s);
}

void ExactHead::backward(const ExactBatch& batch, const double* grad_A, const double* grad_q, const double* grad_s,
                         AnyMatrix grad_hidden) {
  check_numbers("grad_A", grad_A, static_cast<int64_t>(batch.ids.size()));
  check_numbers("grad_q", grad_q, batch.examples());
  check_numbers("grad_s", grad_s, batch.examples());
  if (grad_hidden) {
    expect_shape("grad_hidden", grad_hidden, batch.examples(), core_->features);
    expect_dtype("grad_hidden", grad_hidden.dtype, floating(grad_hidden.dtype), "a floating type");
  }
  core_->backward(batch, grad_A, grad_q, grad_s, grad_hidden);
}

double ExactHead::grad_norm2() const { return core_->grad_norm2(); }
void ExactHead::grad_columns(double* mean_squares) const { core_->grad_columns(mean_squares); }
void ExactHead::scale_grad(double factor) {
  check_option("factor", factor, true, "a finite number");
  core_->scale_grad(factor);
}
void ExactHead::zero_grad() { core_->zero_grad(); }
int64_t ExactHead::pending() const { return core_->pending(); }

void ExactHead::step(const ExactStep& step) {
  check_option("lr", step.lr, step.lr >= 0, "a number >= 0");
  check_option("weight_decay", step.weight_decay, step.weight_decay >= 0, "a number >= 0");
  check_option("momentum", step.momentum, step.momentum >= 0, "a number >= 0");
  if (step.momentum > 0 && !core_->momentum)
    throw ShapeError("momentum: expected 0 of a head without velocities, got " + to_string(step.momentum));
  if (step.column_scale) check_numbers("column_scale", step.column_scale, core_->features);
  core_->step(step);
}

void ExactHead::rows(const int64_t* ids, int64_t n, AnyMatrix out) const {
  check_ids("ids", ids, n, core_->classes);
  expect_shape("out", out, n, core_->features);
  expect_dtype("out", out.dtype, floating(out.dtype), "a floating type");
  core_->rows(ids, n, out);
}

void ExactHead::consolidate() { core_->consolidate(); }
void ExactHead::refresh() {
  if (const int64_t waiting = core_->pending(); waiting > 0)
    throw ShapeError("refresh: expected no gradient that waits for its step, got one of " + to_string(waiting) +
                     " examples");
  core_->refresh();
}
ExactDiagnostics ExactHead::diagnostics() const { return core_->diagnostics(); }

}  // namespace widehead
