// hashed.cc -- checks what the hashed head is given before anything changes
#include "widehead/hashed.h"

#include <cmath>
#include <string>

#include "check.h"
#include "cpu/backend.h"
#include "cpu/hashed_batch.h"
#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::to_string;

void check_layer(const ConstAnyMatrix& weight, const ConstAnyVector& bias) {
  const bool known = weight.dtype == Dtype::f32 || weight.dtype == Dtype::bf16 || weight.dtype == Dtype::f64;
  expect_dtype("weight", weight.dtype, known, "float32, bfloat16 or float64");
  if (weight.rows > int64_t{0xFFFFFFFF})
    throw CapacityError("weight: expected fewer than 2^32 rows, got " + to_string(weight.rows));
  expect_size("bias", bias, weight.rows);
  if (bias && (bias.dtype == Dtype::f64) != (weight.dtype == Dtype::f64))
    throw DtypeError(std::string("bias: ") + name_of(bias.dtype) + " does not go with weights of " +
                     name_of(weight.dtype));
}

void check_classes(const char* name, const int64_t* ids, int64_t n, int64_t least, int64_t classes) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < least || ids[i] >= classes)
      throw LabelError(std::string(name) + ": expected a class in [0, " + to_string(classes) + "), got " +
                       to_string(ids[i]) + " at position " + to_string(i));
}

}  // namespace

const char* name_of(Estimator estimator) {
  switch (estimator) {
    case Estimator::restricted: return "restricted";
    case Estimator::corrected: return "corrected";
    default: return "importance";
  }
}

std::shared_ptr<HashedBatch> hashed_forward(const HashedForward& args) {
  check_layer(args.weight, args.bias);
  expect_dtype("hidden", args.hidden.dtype, floating(args.hidden.dtype), "float32, bfloat16, float16 or float64");
  expect_shape("hidden", args.hidden, args.hidden.rows, args.weight.cols);
  check_finite(args.hidden, "hidden");
  if (args.target.rows != args.hidden.rows)
    throw ShapeError("target: expected " + to_string(args.hidden.rows) + " rows as in hidden, got " +
                     to_string(args.target.rows));
  if (args.target.n_classes != args.weight.rows)
    throw ShapeError("target: is over " + to_string(args.target.n_classes) + " classes, the weights over " +
                     to_string(args.weight.rows));
  check_labels(args.target, args.ignore_index, "target");
  check_classes("candidates", args.candidates, args.hidden.rows * args.n_candidates, -1, args.weight.rows);
  check_classes("negatives", args.negatives, args.n_negatives, 0, args.weight.rows);
  if (args.estimator == Estimator::importance) {
    if (args.tables < 1) throw ShapeError("tables: expected at least 1, got " + to_string(args.tables));
    if (args.n_candidates > 0 && !args.counts)
      throw ShapeError("counts: expected the collisions of the candidates for estimator 'importance', got none");
  }
  return cpu::hashed_forward(args);
}

void hashed_backward(const HashedBackward& args) {
  const auto& batch = static_cast<const cpu::CpuHashedBatch&>(*args.batch);
  check_layer(args.weight, args.bias);
  expect_shape("weight", args.weight, batch.n_classes, batch.features);
  if ((args.weight.dtype == Dtype::f64) != batch.wide)
    throw DtypeError("weight: expected the data type of the forward pass");
  for (int64_t i = 0; i < batch.examples(); ++i) {
    if (!std::isfinite(args.grad_losses[i]))
      throw NonFiniteError("grad_losses: not finite at position " + to_string(i));
    if (!std::isfinite(batch.lse[static_cast<std::size_t>(i)]) && args.grad_losses[i] != 0)
      throw NonFiniteError("logits: the normaliser of example " + to_string(i) + " is not finite");
  }
  if (args.grad_hidden) {
    expect_shape("grad_hidden", args.grad_hidden, batch.examples(), batch.features);
    expect_dtype("grad_hidden", args.grad_hidden.dtype, floating(args.grad_hidden.dtype), "a floating type");
  }
  const Dtype real = real_of(args.weight.dtype);
  if (args.grad_rows) {
    expect_shape("grad_rows", args.grad_rows, batch.rows(), batch.features);
    expect_dtype("grad_rows", args.grad_rows.dtype, args.grad_rows.dtype == real, name_of(real));
    expect_size("grad_bias", args.grad_bias, batch.rows(), static_cast<bool>(args.bias));
    if (args.grad_bias) expect_dtype("grad_bias", args.grad_bias.dtype, args.grad_bias.dtype == real, name_of(real));
  }
  if (args.update) check_update(args.weight, args.bias, *args.update);
  if (args.drift) {
    if (!args.update) throw ShapeError("drift: expected an update to measure, got none");
    check_option("limit", args.drift->limit, args.drift->limit >= 0, "a number >= 0");
  }
  cpu::hashed_backward(args);
}

}  // namespace widehead
