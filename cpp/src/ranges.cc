// ranges.cc -- softmax over several ranges of classes: the terms of the joint normaliser
#include "widehead/ranges.h"

#include <string>
#include <utility>

#include "cpu/dense_prepare.h"
#include "cuda/backend.h"
#include "head_check.h"
#include "widehead/error.h"

namespace widehead {
namespace {

void check(const JoinSoftmax& args) {
  const std::int64_t batch = args.target.rows;
  if (args.loss.kind != Loss::softmax)
    throw ShapeError(std::string("loss: only softmax has something to join, got ") + name_of(args.loss.kind));
  expect_size("lse", args.lse, batch, batch > 0);
  for (const auto& [name, v] : {std::pair("losses", args.losses), {"output", args.output}}) {
    expect_size(name, v, batch);
    if (v) expect_dtype(name, v.dtype, v.dtype == args.lse.dtype, "the data type of lse");
  }
  if (args.lse)
    expect_dtype("lse", args.lse.dtype, args.lse.dtype == Dtype::f32 || args.lse.dtype == Dtype::f64,
                 "float32 or float64");
}

void add(const AnyVector& v, std::int64_t i, double x) {
  if (!v) return;
  if (v.dtype == Dtype::f64) {
    static_cast<double*>(v.data)[i] += x;
  } else {
    float& to = static_cast<float*>(v.data)[i];
    to = static_cast<float>(static_cast<double>(to) + x);
  }
}

}  // namespace

void join_softmax(const JoinSoftmax& args) {
  check(args);
  if (on_gpu(args.device)) return cuda::join_softmax(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  const cpu::Prepared in(args.target, args.loss, 0);
  const double a = args.loss.label_smoothing, classes = static_cast<double>(args.target.n_classes);
  for (std::int64_t b = 0; b < args.target.rows; ++b) {
    const cpu::RowTargets& row = in.rows[static_cast<std::size_t>(b)];
    if (!row.active) continue;
    const double lse = cpu::element(args.lse, b);
    const double factor = (1 - a) * row.weighted + a / classes * in.class_weight_sum;
    add(args.losses, b, factor * lse + args.loss.lse_penalty * lse * lse);
    add(args.output, b, -row.total * lse);
  }
}

std::int64_t scratch_bytes(const JoinSoftmax& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }

}  // namespace widehead
