// exact_check.h -- checks of arguments of the exact head that the CPU and the GPU share
#pragma once
#include "check.h"
#include "widehead/exact.h"

namespace widehead {

inline void check_exact_rows(const AnyMatrix& weight, const AnyMatrix& velocity) {
  const bool real = weight.dtype == Dtype::f32 || weight.dtype == Dtype::f64;
  expect_dtype("weight", weight.dtype, real, "float32 or float64");
  expect_shape("weight", weight, weight.rows, weight.cols);
  if (weight.rows < 1 || weight.cols < 1)
    throw ShapeError("weight: expected at least one class and one feature, got shape " + shape(weight));
  if (!velocity) return;
  expect_shape("velocity", velocity, weight.rows, weight.cols);
  expect_dtype("velocity", velocity.dtype, velocity.dtype == weight.dtype, name_of(weight.dtype));
}

inline void check_exact_target(const Labels& target, std::int64_t examples, std::int64_t classes) {
  if (target.rows != examples)
    throw ShapeError("target: expected " + std::to_string(examples) + " rows as in hidden, got " +
                     std::to_string(target.rows));
  if (target.n_classes != classes)
    throw ShapeError("target: is over " + std::to_string(target.n_classes) + " classes, the weights over " +
                     std::to_string(classes));
}

inline void check_exact_step(double lr, double weight_decay, double momentum, bool velocity) {
  check_option("lr", lr, lr >= 0, "a number >= 0");
  check_option("weight_decay", weight_decay, weight_decay >= 0, "a number >= 0");
  check_option("momentum", momentum, momentum >= 0, "a number >= 0");
  if (momentum > 0 && !velocity)
    throw ShapeError("momentum: expected 0 of a head without velocities, got " + std::to_string(momentum));
}

inline void check_spherical(const SphericalOptions& options) {
  check_option("eps", options.eps, options.eps > 0, "a number > 0");
  check_option("a", options.a, options.a > 0, "a number > 0");
  check_option("b", options.b, true, "a finite number");
}

}  // namespace widehead
