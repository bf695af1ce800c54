// dense.cc -- checks the arguments of the dense head once, then picks the backend
#include "widehead/dense.h"

#include "cpu/backend.h"
#include "cuda/backend.h"
#include "head_check.h"
#include "widehead/error.h"

namespace widehead {
namespace {

template <class Args>
void check_layer(const Args& args) {
  check_layer(args.layer, args.layer.weight.cols, args.device);
}

void check_smoothing(const DenseLayer& l, const LossOptions& loss) {
  if (loss.label_smoothing > 0 && l.offset) throw ShapeError("label_smoothing: does not go with a sampled softmax");
}

void check_softcap(double softcap) { check_option("softcap", softcap, softcap >= 0, "a number > 0, or 0 for none"); }

}  // namespace

void dense_forward(const DenseForward& args) {
  check_layer(args);
  check_forward(args);
  check_smoothing(args.layer, args.loss);
  if (on_gpu(args.device)) return cuda::dense_forward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.layer.hidden.rows > 0) cpu::dense_forward(args);
}

void dense_backward(const DenseBackward& args) {
  check_layer(args);
  check_option("filter_eps", args.filter_eps, args.filter_eps >= 0, "a number >= 0");
  check_backward(args);
  check_smoothing(args.layer, args.loss);
  if (on_gpu(args.device)) return cuda::dense_backward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.update) check_finite_step(args);
  if (args.filtered) *args.filtered = 0;
  cpu::dense_backward(args);
}

void dense_logits(const DenseLogits& args) {
  check_layer(args);
  expect_scores("logits", args.logits, args.layer, args.layer.weight.rows);
  check_softcap(args.softcap);
  if (on_gpu(args.device)) return cuda::dense_logits(args);
  if (args.layer.hidden.rows > 0) cpu::dense_logits(args);
}

void dense_scores(const DenseScores& args) {
  check_layer(args);
  expect_scores("scores", args.scores, args.layer, args.n);
  check_softcap(args.softcap);
  if (on_gpu(args.device)) return cuda::dense_scores(args);
  check_classes(args);
  if (args.layer.hidden.rows > 0 && args.n > 0) cpu::dense_scores(args);
}

void dense_topk(const DenseTopK& args) {
  check_layer(args);
  check_topk(args);
  check_softcap(args.softcap);
  if (on_gpu(args.device)) return cuda::dense_topk(args);
  check_exclude(args);
  if (args.layer.hidden.rows > 0) cpu::dense_topk(args);
}

std::int64_t scratch_bytes(const DenseForward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseBackward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseLogits& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseScores& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
std::int64_t scratch_bytes(const DenseTopK& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }

}  // namespace widehead
