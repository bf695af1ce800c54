// update.cc -- optimiser steps on chosen rows, with the arithmetic of the fused heads
#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "cuda/backend.h"
#include "widehead/parallel.h"
#include "widehead/random.h"
#include "widehead/rows.h"

namespace widehead {
namespace {

using std::int64_t;

double element(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f64: return static_cast<const double*>(data)[i];
    case Dtype::f32: return static_cast<double>(static_cast<const float*>(data)[i]);
    default: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(data)[i]));
  }
}

template <class Real>
void step_rows(const UpdateRows& args) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t cols = args.weight.cols;
  constexpr int64_t kRows = 16;
  parallel_for((args.n + kRows - 1) / kRows, [&](int64_t chunk) {
    auto* g = static_cast<Real*>(cpu::workspace(cpu::Slot::task, static_cast<std::size_t>(cols) * sizeof(Real)));
    for (int64_t i = chunk * kRows; i < std::min(args.n, (chunk + 1) * kRows); ++i) {
      for (int64_t j = 0; j < cols; ++j)
        g[j] = static_cast<Real>(element(args.grad.data, args.grad.dtype, i * args.grad.stride + j));
      k.update.row(*args.update, args.weight, args.rows[i], g);
      if (!args.bias) continue;
      g[0] = static_cast<Real>(element(args.grad_bias.data, args.grad_bias.dtype, i));
      k.update.bias(*args.update, args.bias, args.rows[i], 1, g);
    }
  });
}

void check_rows(const UpdateRows& args) {
  std::vector<int64_t> sorted(args.rows, args.rows + args.n);
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    if (sorted[i] < 0 || sorted[i] >= args.weight.rows)
      throw LabelError("rows: expected rows in [0, " + std::to_string(args.weight.rows) + "), got " +
                       std::to_string(sorted[i]));
    if (i > 0 && sorted[i] == sorted[i - 1])
      throw LabelError("rows: expected distinct rows, got " + std::to_string(sorted[i]) + " twice");
  }
}

}  // namespace

void update_rows(const UpdateRows& args) {
  const bool gpu = args.device.kind == Device::Kind::cuda;
  const auto gradient = [&](Dtype t) {
    return t == Dtype::f32 || t == Dtype::bf16 || t == Dtype::f64 || (gpu && t == Dtype::f16);
  };
  expect_dtype("weight", args.weight.dtype, gradient(args.weight.dtype), "float32, bfloat16 or float64");
  expect_shape("grad", args.grad, args.n, args.weight.cols);
  expect_dtype("grad", args.grad.dtype, gradient(args.grad.dtype), "float32, bfloat16 or float64");
  expect_size("bias", args.bias, args.weight.rows);
  expect_size("grad_bias", args.grad_bias, args.n, static_cast<bool>(args.bias));
  if (args.grad_bias)
    expect_dtype("grad_bias", args.grad_bias.dtype, gradient(args.grad_bias.dtype), "float32, bfloat16 or float64");
  if (args.bias && (args.bias.dtype == Dtype::f64) != (args.weight.dtype == Dtype::f64))
    throw DtypeError(std::string("bias: ") + name_of(args.bias.dtype) + " does not go with weights of " +
                     name_of(args.weight.dtype));
  if (!args.update) throw ShapeError("update: expected an optimiser step, got none");
  check_update(args.weight, args.bias, *args.update);
  if (gpu) return cuda::update_rows(args);
  check_rows(args);
  check_finite(args.grad, "grad");
  if (args.grad_bias) check_finite(args.grad_bias, "grad_bias");
  if (args.weight.dtype == Dtype::f64) {
    step_rows<double>(args);
  } else {
    step_rows<float>(args);
  }
}

std::int64_t scratch_bytes(const UpdateRows& args) {
  if (args.device.kind != Device::Kind::cuda) return 0;
  if (!args.update) throw ShapeError("update: expected an optimiser step, got none");
  return cuda::scratch_bytes(args);
}

}  // namespace widehead
