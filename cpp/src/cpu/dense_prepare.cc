// dense_prepare.cc -- targets sorted by class, sums of their weights, gradients as doubles
#include "cpu/dense_prepare.h"

#include <algorithm>
#include <cmath>

#include "widehead/random.h"

namespace widehead::cpu {

Prepared::Prepared(const Labels& target, const LossOptions& loss, i64 classes)
    : rows(static_cast<std::size_t>(target.rows)),
      n_classes(target.n_classes),
      first_class(target.first_class),
      part(target.part) {
  const auto add = [&](i64 b, i64 at) {
    const i64 c = target.indices[at];
    const float y = target.values ? target.values[at] : 1.0f;
    RowTargets& row = rows[static_cast<std::size_t>(b)];
    if (c >= first_class && c - first_class < classes) entries.push_back({c - first_class, b, y});
    row.total += y;
    row.weighted += static_cast<double>(y) * (loss.class_weight ? loss.class_weight[c] : 1.0f);
  };
  entries.reserve(static_cast<std::size_t>(target.nnz()));
  for (i64 b = 0; b < target.rows; ++b) {
    if (target.indptr) {
      for (i64 at = target.indptr[b]; at < target.indptr[b + 1]; ++at) add(b, at);
    } else if (target.indices[b] == loss.ignore_index) {
      rows[static_cast<std::size_t>(b)].active = false;
    } else {
      add(b, b);
    }
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.cls != b.cls ? a.cls < b.cls : a.row < b.row; });
  class_weight_sum = static_cast<double>(n_classes);
  if (loss.class_weight) {
    class_weight_sum = 0;
    for (i64 c = 0; c < n_classes; ++c) class_weight_sum += static_cast<double>(loss.class_weight[c]);
  }
}

double element(const ConstAnyVector& v, i64 i) {
  if (!v) return 0;
  switch (v.dtype) {
    case Dtype::f64: return static_cast<const double*>(v.data)[i];
    case Dtype::bf16: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(v.data)[i]));
    case Dtype::f16: return static_cast<double>(f16_float(static_cast<const std::uint16_t*>(v.data)[i]));
    default: return static_cast<double>(static_cast<const float*>(v.data)[i]);
  }
}

void Prepared::take_gradients(const ConstAnyVector& losses, const ConstAnyVector& output) {
  grad_losses.assign(rows.size(), 0);
  grad_output.assign(rows.size(), 0);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].active) continue;
    grad_losses[i] = element(losses, static_cast<i64>(i));
    grad_output[i] = element(output, static_cast<i64>(i));
  }
}

double Prepared::largest_grad_loss() const {
  double top = 0;
  for (double g : grad_losses) top = std::max(top, std::abs(g));
  return top;
}

namespace {

template <class Layer>
DenseContext shared_context(const Layer& layer, const LossOptions& loss) {
  DenseContext ctx{};
  ctx.hidden = layer.hidden.data;
  ctx.hidden_dtype = layer.hidden.dtype;
  ctx.batch = layer.hidden.rows;
  ctx.features = layer.hidden.cols;
  ctx.hidden_stride = layer.hidden.stride;
  ctx.weight = const_cast<void*>(layer.weight.data);
  ctx.weight_dtype = layer.weight.dtype;
  ctx.classes = layer.weight.rows;
  ctx.weight_stride = layer.weight.stride;
  ctx.bias = const_cast<void*>(layer.bias.data);
  ctx.bias_dtype = layer.bias.dtype;
  ctx.loss = loss;
  return ctx;
}

}  // namespace

DenseContext layer_context(const DenseLayer& layer, const LossOptions& loss) {
  DenseContext ctx = shared_context(layer, loss);
  ctx.offset = layer.offset;
  return ctx;
}

DenseContext layer_context(const SparseLayer& layer, const LossOptions& loss) {
  DenseContext ctx = shared_context(layer, loss);
  ctx.index = layer.index.data;
  ctx.index_dtype = layer.index.dtype;
  ctx.fan_in = layer.weight.cols;
  ctx.index_stride = layer.index.stride;
  ctx.group_size = layer.index.group_size;
  return ctx;
}

std::vector<i64> sorted_rows(const i64* indptr, const i64* indices, i64 rows) {
  if (!indptr) return {};
  std::vector<i64> out(indices + indptr[0], indices + indptr[rows]);
  for (i64 r = 0; r < rows; ++r)
    std::sort(out.begin() + (indptr[r] - indptr[0]), out.begin() + (indptr[r + 1] - indptr[0]));
  return out;
}

}  // namespace widehead::cpu
