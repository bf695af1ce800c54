// exact.cc -- checks what the exact head is given before anything of its state changes
#include "widehead/exact.h"

#include <cmath>
#include <limits>

#include "check.h"
#include "cpu/exact_core.h"
#include "exact_check.h"
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
  check_exact_rows(weight, velocity);
  check_finite(weight, "weight");
  if (velocity) check_finite(velocity, "velocity");
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
  check_exact_target(target, hidden.rows, core_->classes);
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
  check_exact_step(step.lr, step.weight_decay, step.momentum, core_->momentum);
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
