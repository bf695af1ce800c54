// dense.cc -- the dense head for Python: views in, checked; the core runs without the GIL
#include "widehead/dense.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "parts.h"
#include "widehead/error.h"
#include "widehead/ranges.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

ConstAnyMatrix hidden_view(Arrays& arrays, nb::handle h) {
  return arrays.matrix(h, {"hidden", "[batch, in_features]", kFloating});
}

// hidden, weight, bias and offset; `update` makes weight and bias outputs.
DenseLayer layer_of(Arrays& arrays, nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle offset,
                    bool update = false) {
  const Want want_weight{"weight", "[n_classes, in_features]", kStored};
  const Want want_bias{"bias", "[n_classes]", kStored, true};
  DenseLayer layer;
  layer.hidden = hidden_view(arrays, hidden);
  layer.weight = update ? ConstAnyMatrix(arrays.out_matrix(weight, want_weight)) : arrays.matrix(weight, want_weight);
  layer.bias = update ? ConstAnyVector(arrays.out_vector(bias, want_bias)) : arrays.vector(bias, want_bias);
  layer.offset = sized<float>(arrays.vector(offset, {"offset", "[n_classes]", one_of(Dtype::f32), true}),
                              layer.weight.rows, "offset", "[n_classes]");
  return layer;
}

void forward(nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle offset, nb::handle indptr,
             nb::handle indices, nb::handle values, std::optional<std::int64_t> n_classes,
             std::optional<std::int64_t> first_class, const std::string& loss, double label_smoothing,
             double lse_penalty, double softcap, nb::handle class_weight, std::int64_t ignore_index, nb::handle losses,
             nb::handle output, nb::handle lse, bool tf32, nb::handle gpu) {
  Arrays arrays;
  DenseForward args;
  args.layer = layer_of(arrays, hidden, weight, bias, offset);
  args.layer.tf32 = tf32;
  const std::int64_t classes = args.layer.weight.rows;
  args.target = labels_of(arrays, indptr, indices, values, args.layer.hidden.rows, classes, n_classes, first_class);
  args.loss =
      loss_of(arrays, loss, label_smoothing, lse_penalty, softcap, class_weight, ignore_index, args.target.n_classes);
  args.losses = arrays.out_vector(losses, {"losses", "[batch]", kResult, true});
  args.output = arrays.out_vector(output, {"output", "[batch]", kResult, true});
  args.lse = arrays.out_vector(lse, {"lse", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  dense_forward(args);
}

std::int64_t backward(nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle offset, nb::handle indptr,
                      nb::handle indices, nb::handle values, std::optional<std::int64_t> n_classes,
                      std::optional<std::int64_t> first_class, const std::string& loss, double label_smoothing,
                      double lse_penalty, double softcap, nb::handle class_weight, std::int64_t ignore_index,
                      nb::handle lse, nb::handle grad_losses, nb::handle grad_output, nb::handle grad_lse,
                      nb::handle grad_hidden, nb::handle grad_weight, nb::handle grad_bias, nb::handle update,
                      nb::handle losses, nb::handle output, double filter_eps, nb::handle filtered_count, bool tf32,
                      nb::handle gpu) {
  Arrays arrays;
  DenseBackward args;
  const bool fused = !update.is_none();
  args.layer = layer_of(arrays, hidden, weight, bias, offset, fused);
  args.layer.tf32 = tf32;
  const std::int64_t classes = args.layer.weight.rows;
  args.target = labels_of(arrays, indptr, indices, values, args.layer.hidden.rows, classes, n_classes, first_class);
  args.loss =
      loss_of(arrays, loss, label_smoothing, lse_penalty, softcap, class_weight, ignore_index, args.target.n_classes);
  args.lse = arrays.vector(lse, {"lse", "[batch]", kResult, true});
  args.grad_losses = arrays.vector(grad_losses, {"grad_losses", "[batch]", kResult});
  args.grad_output = arrays.vector(grad_output, {"grad_output", "[batch]", kResult, true});
  args.grad_lse = arrays.vector(grad_lse, {"grad_lse", "[batch]", kResult, true});
  args.grad_hidden = arrays.out_matrix(grad_hidden, {"grad_hidden", "[batch, in_features]", kFloating, true});
  args.grad_weight = arrays.out_matrix(grad_weight, {"grad_weight", "[n_classes, in_features]", kStored, true});
  args.grad_bias = arrays.out_vector(grad_bias, {"grad_bias", "[n_classes]", kStored, true});
  Update step;
  if (fused) {
    step = parse_update(update, arrays);
    args.update = &step;
  }
  args.losses = arrays.out_vector(losses, {"losses", "[batch]", kResult, true});
  args.output = arrays.out_vector(output, {"output", "[batch]", kResult, true});
  const AnyVector filtered_out = arrays.out_vector(filtered_count, {"filtered", "[1]", one_of(Dtype::i64), true});
  check_size(filtered_out ? filtered_out.size : 1, 1, "filtered", "[1]");
  std::int64_t filtered = 0;
  args.filter_eps = filter_eps;
  // On a GPU the count stays there.
  args.filtered = arrays.on_gpu() ? nullptr : &filtered;
  if (filtered_out) args.filtered = static_cast<std::int64_t*>(filtered_out.data);
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  dense_backward(args);
  return filtered;
}

void logits(nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle offset, double softcap, nb::handle out,
            nb::handle gpu) {
  Arrays arrays;
  DenseLogits args;
  args.layer = layer_of(arrays, hidden, weight, bias, offset);
  args.softcap = softcap;
  args.logits = arrays.out_matrix(out, {"logits", "[batch, n_classes]", kResult});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  dense_logits(args);
}

void scores(nb::handle hidden, nb::handle weight, nb::handle bias, double softcap, nb::handle classes, nb::handle out,
            nb::handle gpu) {
  Arrays arrays;
  DenseScores args;
  args.layer = layer_of(arrays, hidden, weight, bias, nb::none());
  args.softcap = softcap;
  const ConstAnyMatrix c = arrays.matrix(classes, {"classes", "[batch, n]", one_of(Dtype::i64)});
  if (c.rows != args.layer.hidden.rows || (c.rows > 1 && c.stride != c.cols))
    throw ShapeError("classes: expected a contiguous array [batch, n] of " + std::to_string(args.layer.hidden.rows) +
                     " rows, got " + std::to_string(c.rows) + " rows at a stride of " + std::to_string(c.stride));
  args.classes = static_cast<const std::int64_t*>(c.data);
  args.n = c.cols;
  args.scores = arrays.out_matrix(out, {"scores", "[batch, n]", kResult});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  dense_scores(args);
}

void topk(nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle offset, double softcap, std::int64_t k,
          nb::handle exclude_indptr, nb::handle exclude_indices, nb::handle out, nb::handle classes, nb::handle lse,
          nb::handle gpu) {
  Arrays arrays;
  DenseTopK args;
  args.layer = layer_of(arrays, hidden, weight, bias, offset);
  args.softcap = softcap;
  args.k = k;
  constexpr Dtypes i64 = one_of(Dtype::i64);
  const ConstAnyVector p = arrays.vector(exclude_indptr, {"exclude_indptr", "[batch + 1]", i64, true});
  const ConstAnyVector i = arrays.vector(exclude_indices, {"exclude_indices", "[nnz]", i64, true});
  if (static_cast<bool>(p) != static_cast<bool>(i))
    throw ShapeError("exclude_indptr and exclude_indices: expected both or neither");
  args.exclude_indptr = sized<std::int64_t>(p, args.layer.hidden.rows + 1, "exclude_indptr", "[batch + 1]");
  args.exclude_indices = static_cast<const std::int64_t*>(i.data);
  args.exclude_size = i.size;
  if (p && !arrays.on_gpu() && args.exclude_indptr[args.layer.hidden.rows] != i.size)
    throw LabelError("exclude_indptr: expected its last entry to be the number of exclude_indices " +
                     std::to_string(i.size) + ", got " + std::to_string(args.exclude_indptr[args.layer.hidden.rows]));
  args.scores = arrays.out_matrix(out, {"scores", "[batch, k]", kResult});
  const AnyMatrix c = arrays.out_matrix(classes, {"classes", "[batch, k]", i64});
  args.classes = {static_cast<std::int64_t*>(c.data), c.rows, c.cols, c.stride};
  args.lse = arrays.out_vector(lse, {"lse", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  dense_topk(args);
}

void join(nb::handle indptr, nb::handle indices, nb::handle values, std::int64_t n_classes, double label_smoothing,
          double lse_penalty, nb::handle class_weight, std::int64_t ignore_index, nb::handle lse, nb::handle losses,
          nb::handle output, nb::handle gpu) {
  Arrays arrays;
  JoinSoftmax args;
  args.lse = arrays.vector(lse, {"lse", "[batch]", kResult});
  args.target = labels_of(arrays, indptr, indices, values, args.lse.size, n_classes);
  args.loss = loss_of(arrays, "softmax", label_smoothing, lse_penalty, 0.0, class_weight, ignore_index, n_classes);
  args.losses = arrays.out_vector(losses, {"losses", "[batch]", kResult, true});
  args.output = arrays.out_vector(output, {"output", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  join_softmax(args);
}

}  // namespace

void bind_dense(nb::module_& m) {
  const nb::object none = nb::none();
  m.def("dense_forward", &forward, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "offset"_a.none() = none, "indptr"_a.none(), "indices"_a.none(), "values"_a.none(), "n_classes"_a.none() = none,
        "first_class"_a.none() = none, "loss"_a, "label_smoothing"_a = 0.0, "lse_penalty"_a = 0.0, "softcap"_a = 0.0,
        "class_weight"_a.none() = none, "ignore_index"_a = -100, "losses"_a.none(), "output"_a.none(), "lse"_a.none(),
        "tf32"_a = false, "gpu"_a.none() = none);
  m.def("dense_backward", &backward, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "offset"_a.none() = none, "indptr"_a.none(), "indices"_a.none(), "values"_a.none(), "n_classes"_a.none() = none,
        "first_class"_a.none() = none, "loss"_a, "label_smoothing"_a = 0.0, "lse_penalty"_a = 0.0, "softcap"_a = 0.0,
        "class_weight"_a.none() = none, "ignore_index"_a = -100, "lse"_a.none(), "grad_losses"_a.none(),
        "grad_output"_a.none() = none, "grad_lse"_a.none() = none, "grad_hidden"_a.none() = none,
        "grad_weight"_a.none() = none, "grad_bias"_a.none() = none, "update"_a.none() = none, "losses"_a.none() = none,
        "output"_a.none() = none, "filter_eps"_a = 0.0, "filtered"_a.none() = none, "tf32"_a = false,
        "gpu"_a.none() = none);
  m.def("dense_logits", &logits, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "offset"_a.none() = none, "softcap"_a = 0.0, "logits"_a.none(), "gpu"_a.none() = none);
  m.def("dense_scores", &scores, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "softcap"_a = 0.0, "classes"_a.none(), "scores"_a.none(), "gpu"_a.none() = none);
  m.def("dense_topk", &topk, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "offset"_a.none() = none, "softcap"_a = 0.0, "k"_a, "exclude_indptr"_a.none() = none,
        "exclude_indices"_a.none() = none, "scores"_a.none(), "classes"_a.none(), "lse"_a.none() = none,
        "gpu"_a.none() = none);
  m.def("join_softmax", &join, nb::kw_only(), "indptr"_a.none(), "indices"_a.none(), "values"_a.none(), "n_classes"_a,
        "label_smoothing"_a = 0.0, "lse_penalty"_a = 0.0, "class_weight"_a.none() = none, "ignore_index"_a = -100,
        "lse"_a.none(), "losses"_a.none(), "output"_a.none() = none, "gpu"_a.none() = none);
}

}  // namespace widehead::python
