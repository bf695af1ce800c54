// head_check.h -- checks of arguments that all the heads share; a Layer has hidden, weight and bias
#pragma once
#include <string>

#include "check.h"
#include "widehead/dense.h"
#include "widehead/labels.h"

namespace widehead {

inline bool on_gpu(const Device& device) { return device.kind == Device::Kind::cuda; }

// Types of hidden, weight and bias, and their shapes for `features` inputs.
template <class Layer>
void check_layer(const Layer& l, std::int64_t features, const Device& device) {
  const Dtype w = l.weight.dtype, h = l.hidden.dtype;
  if (w == Dtype::f16 && !on_gpu(device))
    throw DtypeError("weight: float16 is for a GPU; on the CPU use bfloat16 or float32");
  expect_dtype("weight", w, floating(w), "float32, bfloat16, float16 or float64");
  expect_dtype("hidden", h, floating(h), "float32, bfloat16, float16 or float64");
  if (h == Dtype::f64 && w != Dtype::f64)
    throw DtypeError(std::string("hidden: float64 needs float64 weights, which are ") + name_of(w));
  if (l.weight.rows < 1 || l.weight.cols < 1)
    throw ShapeError("weight: expected at least one class and one feature, got shape " + shape(l.weight));
  if (l.hidden.rows > 0 && l.hidden.cols != features)
    throw ShapeError("hidden: expected " + std::to_string(features) + " features as in weight, got shape " +
                     shape(l.hidden));
  expect_shape("hidden", l.hidden, l.hidden.rows, features);
  expect_shape("weight", l.weight, l.weight.rows, l.weight.cols);
  expect_size("bias", l.bias, l.weight.rows);
  if (l.bias) {
    expect_dtype("bias", l.bias.dtype, floating(l.bias.dtype) && l.bias.dtype != Dtype::f16,
                 "float32, bfloat16 or float64");
    if ((l.bias.dtype == Dtype::f64) != (w == Dtype::f64))
      throw DtypeError(std::string("bias: ") + name_of(l.bias.dtype) + " does not go with weights of " + name_of(w));
  }
}

template <class Layer>
void expect_real(const char* name, const ConstAnyVector& v, const Layer& layer) {
  const Dtype real = real_of(layer.weight.dtype);
  if (v) expect_dtype(name, v.dtype, v.dtype == real, name_of(real));
}

template <class Layer>
void check_options(const Layer& l, const Labels& target, const LossOptions& loss) {
  if (target.rows != l.hidden.rows)
    throw ShapeError("target: expected " + std::to_string(l.hidden.rows) + " rows as in hidden, got " +
                     std::to_string(target.rows));
  if (!target.part && target.n_classes != l.weight.rows)
    throw ShapeError("target: is over " + std::to_string(target.n_classes) + " classes, the weights over " +
                     std::to_string(l.weight.rows));
  if (target.part && (target.first_class < 0 || target.first_class > target.n_classes - l.weight.rows))
    throw ShapeError("first_class: expected 0 to " + std::to_string(target.n_classes - l.weight.rows) + " for " +
                     std::to_string(l.weight.rows) + " of " + std::to_string(target.n_classes) + " classes, got " +
                     std::to_string(target.first_class));
  const bool softmax = loss.kind == Loss::softmax;
  check_option("label_smoothing", loss.label_smoothing, loss.label_smoothing >= 0 && loss.label_smoothing <= 1,
               "a number in [0, 1]");
  check_option("lse_penalty", loss.lse_penalty, loss.lse_penalty >= 0, "a number >= 0");
  check_option("softcap", loss.softcap, loss.softcap >= 0, "a number > 0, or 0 for none");
  if (!softmax && (loss.label_smoothing > 0 || loss.lse_penalty > 0 || loss.softcap > 0))
    throw ShapeError(std::string("loss: label_smoothing, lse_penalty and softcap belong to softmax, got ") +
                     name_of(loss.kind));
  if (loss.label_smoothing > 0 && target.indptr)
    throw ShapeError("label_smoothing: expected one class an example, got multi-label targets");
}

template <class Args>
void check_forward(const Args& args) {
  const auto& l = args.layer;
  for (const auto& [name, v] : {std::pair("losses", args.losses), {"output", args.output}, {"lse", args.lse}}) {
    expect_size(name, v, l.hidden.rows);
    expect_real(name, v, l);
  }
  check_options(l, args.target, args.loss);
}

// All but grad_hidden's width, which is the head's.
template <class Args>
void check_backward(const Args& args) {
  const auto& l = args.layer;
  const std::int64_t batch = l.hidden.rows;
  const bool softmax = args.loss.kind == Loss::softmax;
  expect_size("losses", args.losses, batch);
  expect_size("output", args.output, batch);
  expect_real("losses", args.losses, l);
  expect_real("output", args.output, l);
  if (softmax && (args.losses || args.output))
    throw ShapeError("losses: softmax needs the forward pass first, which computes them");
  expect_size("lse", args.lse, batch, softmax && batch > 0);
  expect_size("grad_losses", args.grad_losses, batch, batch > 0);
  expect_size("grad_output", args.grad_output, batch);
  expect_size("grad_lse", args.grad_lse, batch);
  if (args.grad_hidden) expect_shape("grad_hidden", args.grad_hidden, batch, l.hidden.cols);
  if (args.grad_weight) {
    expect_shape("grad_weight", args.grad_weight, l.weight.rows, l.weight.cols);
    expect_dtype("grad_weight", args.grad_weight.dtype,
                 floating(args.grad_weight.dtype) && (args.grad_weight.dtype != Dtype::f16 || on_gpu(args.device)),
                 "float32, bfloat16 or float64");
  }
  expect_size("grad_bias", args.grad_bias, l.weight.rows);
  if (args.update && args.grad_weight)
    throw ShapeError("update: a fused step leaves no gradient; give grad_weight or update, not both");
  if (args.update) check_update(l.weight, l.bias, *args.update);
  check_options(l, args.target, args.loss);
}

// A fused step takes finite numbers only.
template <class Args>
void check_finite_step(const Args& args) {
  check_finite(args.layer.hidden, "hidden");
  if (args.loss.kind == Loss::softmax) check_finite(args.lse, "lse");
  check_finite(args.grad_losses, "grad_losses");
  if (args.grad_output) check_finite(args.grad_output, "grad_output");
  if (args.grad_lse) check_finite(args.grad_lse, "grad_lse");
}

template <class Layer>
void expect_scores(const char* name, const AnyMatrix& m, const Layer& l, std::int64_t cols) {
  expect_shape(name, m, l.hidden.rows, cols);
  expect_dtype(name, m.dtype, m.dtype == real_of(l.weight.dtype), name_of(real_of(l.weight.dtype)));
}

// CPU: the classes whose scores are wanted, [B, n].
template <class Args>
void check_classes(const Args& args) {
  const std::int64_t classes = args.layer.weight.rows;
  for (std::int64_t i = 0; i < args.layer.hidden.rows * args.n; ++i)
    if (args.classes[i] < 0 || args.classes[i] >= classes)
      throw LabelError("classes: expected a class in [0, " + std::to_string(classes) + "), got " +
                       std::to_string(args.classes[i]) + " at row " + std::to_string(i / args.n) + ", column " +
                       std::to_string(i % args.n));
}

template <class Args>
void check_topk(const Args& args) {
  if (args.k < 1) throw ShapeError("k: expected at least 1, got " + std::to_string(args.k));
  expect_scores("scores", args.scores, args.layer, args.k);
  if (args.classes.rows != args.layer.hidden.rows || args.classes.cols != args.k)
    throw ShapeError("classes: expected shape [" + std::to_string(args.layer.hidden.rows) + ", " +
                     std::to_string(args.k) + "], got [" + std::to_string(args.classes.rows) + ", " +
                     std::to_string(args.classes.cols) + "]");
  expect_size("lse", args.lse, args.layer.hidden.rows);
  expect_real("lse", args.lse, args.layer);
}

// CPU: the row pointers of what a query leaves out.
template <class Args>
void check_exclude(const Args& args) {
  if (!args.exclude_indptr) return;
  if (args.exclude_indptr[0] < 0)
    throw ShapeError("exclude: row pointers begin at " + std::to_string(args.exclude_indptr[0]) +
                     ", expected at least 0");
  for (std::int64_t b = 0; b < args.layer.hidden.rows; ++b)
    if (args.exclude_indptr[b + 1] < args.exclude_indptr[b])
      throw ShapeError("exclude: row pointers decrease at row " + std::to_string(b));
}

}  // namespace widehead
