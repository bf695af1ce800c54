// dense.cc -- checks the arguments of the dense head once, then picks the backend
#include "widehead/dense.h"

#include <cmath>
#include <string>

#include "check.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::string;
using std::to_string;

void expect_real(const char* name, const ConstAnyVector& v, const DenseLayer& layer) {
  const Dtype real = real_of(layer.weight.dtype);
  if (v) expect_dtype(name, v.dtype, v.dtype == real, name_of(real));
}

bool on_gpu(const Device& device) { return device.kind == Device::Kind::cuda; }

void check_layer(const DenseLayer& l, const Device& device) {
  const Dtype w = l.weight.dtype, h = l.hidden.dtype;
  if (w == Dtype::f16 && !on_gpu(device))
    throw DtypeError("weight: float16 is for a GPU; on the CPU use bfloat16 or float32");
  expect_dtype("weight", w, floating(w), "float32, bfloat16, float16 or float64");
  expect_dtype("hidden", h, floating(h), "float32, bfloat16, float16 or float64");
  if (h == Dtype::f64 && w != Dtype::f64)
    throw DtypeError(string("hidden: float64 needs float64 weights, which are ") + name_of(w));
  if (l.weight.rows < 1 || l.weight.cols < 1)
    throw ShapeError("weight: expected at least one class and one feature, got shape " + shape(l.weight));
  if (l.hidden.rows > 0 && l.hidden.cols != l.weight.cols)
    throw ShapeError("hidden: expected " + to_string(l.weight.cols) + " features as in weight, got shape " +
                     shape(l.hidden));
  expect_shape("hidden", l.hidden, l.hidden.rows, l.weight.cols);
  expect_shape("weight", l.weight, l.weight.rows, l.weight.cols);
  expect_size("bias", l.bias, l.weight.rows);
  if (l.bias) {
    expect_dtype("bias", l.bias.dtype, floating(l.bias.dtype) && l.bias.dtype != Dtype::f16,
                 "float32, bfloat16 or float64");
    if ((l.bias.dtype == Dtype::f64) != (w == Dtype::f64))
      throw DtypeError(string("bias: ") + name_of(l.bias.dtype) + " does not go with weights of " + name_of(w));
  }
}

void check_options(const DenseLayer& l, const Labels& target, const LossOptions& loss) {
  if (target.rows != l.hidden.rows)
    throw ShapeError("target: expected " + to_string(l.hidden.rows) + " rows as in hidden, got " +
                     to_string(target.rows));
  if (target.n_classes != l.weight.rows)
    throw ShapeError("target: is over " + to_string(target.n_classes) + " classes, the weights over " +
                     to_string(l.weight.rows));
  const bool softmax = loss.kind == Loss::softmax;
  check_option("label_smoothing", loss.label_smoothing, loss.label_smoothing >= 0 && loss.label_smoothing <= 1,
               "a number in [0, 1]");
  check_option("lse_penalty", loss.lse_penalty, loss.lse_penalty >= 0, "a number >= 0");
  check_option("softcap", loss.softcap, loss.softcap >= 0, "a number > 0, or 0 for none");
  if (!softmax && (loss.label_smoothing > 0 || loss.lse_penalty > 0 || loss.softcap > 0))
    throw ShapeError(string("loss: label_smoothing, lse_penalty and softcap belong to softmax, got ") +
                     name_of(loss.kind));
  if (loss.label_smoothing > 0 && target.indptr)
    throw ShapeError("label_smoothing: expected one class an example, got multi-label targets");
  if (loss.label_smoothing > 0 && l.offset) throw ShapeError("label_smoothing: does not go with a sampled softmax");
}

void check_outputs(const DenseLayer& l, const AnyVector& losses, const AnyVector& output) {
  expect_size("losses", losses, l.hidden.rows);
  expect_size("output", output, l.hidden.rows);
  expect_real("losses", losses, l);
  expect_real("output", output, l);
}

void expect_scores(const char* name, const AnyMatrix& m, const DenseLayer& l, int64_t cols) {
  expect_shape(name, m, l.hidden.rows, cols);
  expect_dtype(name, m.dtype, m.dtype == real_of(l.weight.dtype), name_of(real_of(l.weight.dtype)));
}

}  // namespace

void dense_forward(const DenseForward& args) {
  check_layer(args.layer, args.device);
  check_outputs(args.layer, args.losses, args.output);
  expect_size("lse", args.lse, args.layer.hidden.rows);
  expect_real("lse", args.lse, args.layer);
  check_options(args.layer, args.target, args.loss);
  if (on_gpu(args.device)) return cuda::dense_forward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.layer.hidden.rows > 0) cpu::dense_forward(args);
}

void dense_backward(const DenseBackward& args) {
  const DenseLayer& l = args.layer;
  check_layer(l, args.device);
  check_outputs(l, args.losses, args.output);
  const bool softmax = args.loss.kind == Loss::softmax;
  if (softmax && (args.losses || args.output))
    throw ShapeError("losses: softmax needs dense_forward first, which computes them");
  expect_size("lse", args.lse, l.hidden.rows, softmax && l.hidden.rows > 0);
  expect_size("grad_losses", args.grad_losses, l.hidden.rows, l.hidden.rows > 0);
  expect_size("grad_output", args.grad_output, l.hidden.rows);
  expect_size("grad_lse", args.grad_lse, l.hidden.rows);
  if (args.grad_hidden) expect_shape("grad_hidden", args.grad_hidden, l.hidden.rows, l.weight.cols);
  if (args.grad_weight) {
    expect_shape("grad_weight", args.grad_weight, l.weight.rows, l.weight.cols);
    expect_dtype("grad_weight", args.grad_weight.dtype,
                 floating(args.grad_weight.dtype) && (args.grad_weight.dtype != Dtype::f16 || on_gpu(args.device)),
                 "float32, bfloat16 or float64");
  }
  expect_size("grad_bias", args.grad_bias, l.weight.rows);
  check_option("filter_eps", args.filter_eps, args.filter_eps >= 0, "a number >= 0");
  if (args.update && args.grad_weight)
    throw ShapeError("update: a fused step leaves no gradient; give grad_weight or update, not both");
  if (args.update) check_update(l.weight, l.bias, *args.update);
  check_options(l, args.target, args.loss);
  if (on_gpu(args.device)) return cuda::dense_backward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.update) {
    check_finite(l.hidden, "hidden");
    if (softmax) check_finite(args.lse, "lse");
    check_finite(args.grad_losses, "grad_losses");
    if (args.grad_output) check_finite(args.grad_output, "grad_output");
    if (args.grad_lse) check_finite(args.grad_lse, "grad_lse");
  }
  if (args.filtered) *args.filtered = 0;
  cpu::dense_backward(args);
}

void dense_logits(const DenseLogits& args) {
  check_layer(args.layer, args.device);
  expect_scores("logits", args.logits, args.layer, args.layer.weight.rows);
  check_option("softcap", args.softcap, args.softcap >= 0, "a number > 0, or 0 for none");
  if (on_gpu(args.device)) return cuda::dense_logits(args);
  if (args.layer.hidden.rows > 0) cpu::dense_logits(args);
}

void dense_scores(const DenseScores& args) {
  check_layer(args.layer, args.device);
  expect_scores("scores", args.scores, args.layer, args.n);
  check_option("softcap", args.softcap, args.softcap >= 0, "a number > 0, or 0 for none");
  if (on_gpu(args.device)) return cuda::dense_scores(args);
  const int64_t classes = args.layer.weight.rows;
  for (int64_t i = 0; i < args.layer.hidden.rows * args.n; ++i)
    if (args.classes[i] < 0 || args.classes[i] >= classes)
      throw LabelError("classes: expected a class in [0, " + to_string(classes) + "), got " +
                       to_string(args.classes[i]) + " at row " + to_string(i / args.n) + ", column " +
                       to_string(i % args.n));
  if (args.layer.hidden.rows > 0 && args.n > 0) cpu::dense_scores(args);
}

void dense_topk(const DenseTopK& args) {
  check_layer(args.layer, args.device);
  if (args.k < 1) throw ShapeError("k: expected at least 1, got " + to_string(args.k));
  expect_scores("scores", args.scores, args.layer, args.k);
  if (args.classes.rows != args.layer.hidden.rows || args.classes.cols != args.k)
    throw ShapeError("classes: expected shape [" + to_string(args.layer.hidden.rows) + ", " + to_string(args.k) +
                     "], got [" + to_string(args.classes.rows) + ", " + to_string(args.classes.cols) + "]");
  expect_size("lse", args.lse, args.layer.hidden.rows);
  expect_real("lse", args.lse, args.layer);
  check_option("softcap", args.softcap, args.softcap >= 0, "a number > 0, or 0 for none");
  if (on_gpu(args.device)) return cuda::dense_topk(args);
  if (args.exclude_indptr) {
    if (args.exclude_indptr[0] < 0)
      throw ShapeError("exclude: row pointers begin at " + to_string(args.exclude_indptr[0]) + ", expected at least 0");
    for (int64_t b = 0; b < args.layer.hidden.rows; ++b)
      if (args.exclude_indptr[b + 1] < args.exclude_indptr[b])
        throw ShapeError("exclude: row pointers decrease at row " + to_string(b));
  }
  if (args.layer.hidden.rows > 0) cpu::dense_topk(args);
}

std::int64_t scratch_bytes(const DenseForward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseBackward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseLogits& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseScores& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseTopK& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }

}  // namespace widehead
