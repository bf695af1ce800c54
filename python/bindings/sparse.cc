// sparse.cc -- the sparse head for Python: views in, checked; the core runs without the GIL
#include "widehead/sparse.h"

#include <nanobind/stl/string.h>

#include "parts.h"
#include "widehead/error.h"
#include "widehead/rewire.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kIndex = one_of(Dtype::u16) | one_of(Dtype::i32);
constexpr Dtypes kInt64 = one_of(Dtype::i64);

SparseLayer layer_of(Arrays& arrays, nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias,
                     std::int64_t group_size, bool update = false) {
  const Want want_weight{"weight", "[n_classes, fan_in]", kStored};
  const Want want_bias{"bias", "[n_classes]", kStored, true};
  SparseLayer layer;
  layer.hidden = arrays.matrix(hidden, {"hidden", "[batch, in_features]", kFloating});
  layer.weight = update ? ConstAnyMatrix(arrays.out_matrix(weight, want_weight)) : arrays.matrix(weight, want_weight);
  layer.bias = update ? ConstAnyVector(arrays.out_vector(bias, want_bias)) : arrays.vector(bias, want_bias);
  const ConstAnyMatrix i = arrays.matrix(index, {"index", "[groups, fan_in]", kIndex});
  if (group_size < 1) throw ShapeError("group_size: expected at least 1, got " + std::to_string(group_size));
  const std::int64_t groups = (layer.weight.rows + group_size - 1) / group_size;
  if (i.rows != groups || i.cols != layer.weight.cols)
    throw ShapeError("index: expected shape [groups, fan_in] = [" + std::to_string(groups) + ", " +
                     std::to_string(layer.weight.cols) + "], got [" + std::to_string(i.rows) + ", " +
                     std::to_string(i.cols) + "]");
  layer.index = {i.data, i.dtype, i.stride, group_size};
  return layer;
}

void forward(nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias, std::int64_t group_size,
             nb::handle indptr, nb::handle indices, nb::handle values, std::optional<std::int64_t> n_classes,
             std::optional<std::int64_t> first_class, const std::string& loss, double label_smoothing,
             double lse_penalty, nb::handle class_weight, std::int64_t ignore_index, nb::handle losses,
             nb::handle output, nb::handle lse, nb::handle gpu) {
  Arrays arrays;
  SparseForward args;
  args.layer = layer_of(arrays, hidden, weight, index, bias, group_size);
  const std::int64_t classes = args.layer.weight.rows;
  args.target = labels_of(arrays, indptr, indices, values, args.layer.hidden.rows, classes, n_classes, first_class);
  args.loss =
      loss_of(arrays, loss, label_smoothing, lse_penalty, 0.0, class_weight, ignore_index, args.target.n_classes);
  args.losses = arrays.out_vector(losses, {"losses", "[batch]", kResult, true});
  args.output = arrays.out_vector(output, {"output", "[batch]", kResult, true});
  args.lse = arrays.out_vector(lse, {"lse", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  sparse_forward(args);
}

void backward(nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias, std::int64_t group_size,
              nb::handle indptr, nb::handle indices, nb::handle values, std::optional<std::int64_t> n_classes,
              std::optional<std::int64_t> first_class, const std::string& loss, double label_smoothing,
              double lse_penalty, nb::handle class_weight, std::int64_t ignore_index, nb::handle lse,
              nb::handle grad_losses, nb::handle grad_output, nb::handle grad_lse, nb::handle grad_hidden,
              nb::handle grad_weight, nb::handle grad_bias, nb::handle update, nb::handle losses, nb::handle output,
              nb::handle gpu) {
  Arrays arrays;
  SparseBackward args;
  const bool fused = !update.is_none();
  args.layer = layer_of(arrays, hidden, weight, index, bias, group_size, fused);
  const std::int64_t classes = args.layer.weight.rows;
  args.target = labels_of(arrays, indptr, indices, values, args.layer.hidden.rows, classes, n_classes, first_class);
  args.loss =
      loss_of(arrays, loss, label_smoothing, lse_penalty, 0.0, class_weight, ignore_index, args.target.n_classes);
  args.lse = arrays.vector(lse, {"lse", "[batch]", kResult, true});
  args.grad_losses = arrays.vector(grad_losses, {"grad_losses", "[batch]", kResult});
  args.grad_output = arrays.vector(grad_output, {"grad_output", "[batch]", kResult, true});
  args.grad_lse = arrays.vector(grad_lse, {"grad_lse", "[batch]", kResult, true});
  args.grad_hidden = arrays.out_matrix(grad_hidden, {"grad_hidden", "[batch, in_features]", kFloating, true});
  args.grad_weight = arrays.out_matrix(grad_weight, {"grad_weight", "[n_classes, fan_in]", kStored, true});
  args.grad_bias = arrays.out_vector(grad_bias, {"grad_bias", "[n_classes]", kStored, true});
  Update step;
  if (fused) {
    step = parse_update(update, arrays);
    args.update = &step;
  }
  args.losses = arrays.out_vector(losses, {"losses", "[batch]", kResult, true});
  args.output = arrays.out_vector(output, {"output", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  sparse_backward(args);
}

void logits(nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias, std::int64_t group_size,
            nb::handle out, nb::handle gpu) {
  Arrays arrays;
  SparseLogits args;
  args.layer = layer_of(arrays, hidden, weight, index, bias, group_size);
  args.logits = arrays.out_matrix(out, {"logits", "[batch, n_classes]", kResult});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  sparse_logits(args);
}

void scores(nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias, std::int64_t group_size,
            nb::handle classes, nb::handle out, nb::handle gpu) {
  Arrays arrays;
  SparseScores args;
  args.layer = layer_of(arrays, hidden, weight, index, bias, group_size);
  const ConstAnyMatrix c = arrays.matrix(classes, {"classes", "[batch, n]", kInt64});
  if (c.rows != args.layer.hidden.rows || (c.rows > 1 && c.stride != c.cols))
    throw ShapeError("classes: expected a contiguous array [batch, n] of " + std::to_string(args.layer.hidden.rows) +
                     " rows, got " + std::to_string(c.rows) + " rows at a stride of " + std::to_string(c.stride));
  args.classes = static_cast<const std::int64_t*>(c.data);
  args.n = c.cols;
  args.scores = arrays.out_matrix(out, {"scores", "[batch, n]", kResult});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  sparse_scores(args);
}

void topk(nb::handle hidden, nb::handle weight, nb::handle index, nb::handle bias, std::int64_t group_size,
          std::int64_t k, nb::handle exclude_indptr, nb::handle exclude_indices, nb::handle out, nb::handle classes,
          nb::handle lse, nb::handle gpu) {
  Arrays arrays;
  SparseTopK args;
  args.layer = layer_of(arrays, hidden, weight, index, bias, group_size);
  args.k = k;
  const ConstAnyVector p = arrays.vector(exclude_indptr, {"exclude_indptr", "[batch + 1]", kInt64, true});
  const ConstAnyVector i = arrays.vector(exclude_indices, {"exclude_indices", "[nnz]", kInt64, true});
  if (static_cast<bool>(p) != static_cast<bool>(i))
    throw ShapeError("exclude_indptr and exclude_indices: expected both or neither");
  args.exclude_indptr = sized<std::int64_t>(p, args.layer.hidden.rows + 1, "exclude_indptr", "[batch + 1]");
  args.exclude_indices = static_cast<const std::int64_t*>(i.data);
  args.exclude_size = i.size;
  if (p && !arrays.on_gpu() && args.exclude_indptr[args.layer.hidden.rows] != i.size)
    throw LabelError("exclude_indptr: expected its last entry to be the number of exclude_indices " +
                     std::to_string(i.size) + ", got " + std::to_string(args.exclude_indptr[args.layer.hidden.rows]));
  args.scores = arrays.out_matrix(out, {"scores", "[batch, k]", kResult});
  const AnyMatrix c = arrays.out_matrix(classes, {"classes", "[batch, k]", kInt64});
  args.classes = {static_cast<std::int64_t*>(c.data), c.rows, c.cols, c.stride};
  args.lse = arrays.out_vector(lse, {"lse", "[batch]", kResult, true});
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  sparse_topk(args);
}

void draw(nb::handle index, std::int64_t in_features, std::uint64_t seed, std::int64_t first_row, nb::handle gpu) {
  Arrays arrays;
  const AnyMatrix i = arrays.out_matrix(index, {"index", "[groups, fan_in]", kIndex});
  const Device device = arrays.device(gpu);
  nb::gil_scoped_release no_gil;
  draw_index(i.data, i.dtype, i.stride, i.rows, i.cols, in_features, seed, first_row, device);
}

void check(nb::handle index, std::int64_t in_features, nb::handle gpu) {
  Arrays arrays;
  const ConstAnyMatrix i = arrays.matrix(index, {"index", "[groups, fan_in]", kIndex});
  const Device device = arrays.device(gpu);
  nb::gil_scoped_release no_gil;
  check_index({i.data, i.dtype, i.stride, 1}, i.rows, i.cols, in_features, device);
}

RewireMode parse_mode(const std::string& name) {
  for (RewireMode mode : {RewireMode::magnitude_global, RewireMode::magnitude_row, RewireMode::threshold})
    if (name == name_of(mode)) return mode;
  throw ShapeError("mode: expected 'magnitude_global', 'magnitude_row' or 'threshold', got '" + name + "'");
}

nb::object move(nb::handle weight, nb::handle index, std::int64_t group_size, std::int64_t in_features,
                nb::handle first, nb::handle second, nb::handle compensation, const std::string& mode, double fraction,
                double threshold, bool keep_value, std::uint64_t seed, std::uint64_t step, std::int64_t first_row,
                nb::handle device_step, nb::handle moved, nb::handle gpu) {
  Arrays arrays;
  Rewire args;
  args.weight = arrays.out_matrix(weight, {"weight", "[n_classes, fan_in]", kStored});
  const AnyMatrix i = arrays.out_matrix(index, {"index", "[groups, fan_in]", kIndex});
  if (group_size < 1) throw ShapeError("group_size: expected at least 1, got " + std::to_string(group_size));
  expect_shape(i, (args.weight.rows + group_size - 1) / group_size, args.weight.cols, "index", "[groups, fan_in]");
  args.index = i.data;
  args.index_dtype = i.dtype;
  args.index_stride = i.stride;
  args.group_size = group_size;
  args.in_features = in_features;
  args.first = arrays.out_matrix(first, {"first", "[n_classes, fan_in]", kResult, true});
  args.second = arrays.out_matrix(second, {"second", "[n_classes, fan_in]", kResult, true});
  args.compensation =
      arrays.out_matrix(compensation, {"compensation", "[n_classes, fan_in]", one_of(Dtype::bf16), true});
  args.mode = parse_mode(mode);
  args.fraction = fraction;
  args.threshold = threshold;
  args.keep_value = keep_value;
  args.seed = seed;
  args.step = step;
  args.first_row = first_row;
  args.device_step =
      sized<std::int64_t>(arrays.vector(device_step, {"device_step", "[1]", kInt64, true}), 1, "device_step", "[1]");
  const AnyVector count = arrays.out_vector(moved, {"moved", "[1]", kInt64, true});
  args.moved = const_cast<std::int64_t*>(sized<std::int64_t>(count, 1, "moved", "[1]"));
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  std::int64_t n = 0;
  {
    nb::gil_scoped_release no_gil;
    n = rewire(args);
  }
  return arrays.on_gpu() ? nb::none() : nb::object(nb::int_(n));
}

}  // namespace

void bind_sparse(nb::module_& m) {
  const nb::object none = nb::none();
  m.def("sparse_forward", &forward, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "index"_a.none(),
        "bias"_a.none(), "group_size"_a = 1, "indptr"_a.none(), "indices"_a.none(), "values"_a.none(),
        "n_classes"_a.none() = none, "first_class"_a.none() = none, "loss"_a, "label_smoothing"_a = 0.0,
        "lse_penalty"_a = 0.0, "class_weight"_a.none() = none, "ignore_index"_a = -100, "losses"_a.none(),
        "output"_a.none(), "lse"_a.none(), "gpu"_a.none() = none);
  m.def("sparse_backward", &backward, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "index"_a.none(),
        "bias"_a.none(), "group_size"_a = 1, "indptr"_a.none(), "indices"_a.none(), "values"_a.none(),
        "n_classes"_a.none() = none, "first_class"_a.none() = none, "loss"_a, "label_smoothing"_a = 0.0,
        "lse_penalty"_a = 0.0, "class_weight"_a.none() = none, "ignore_index"_a = -100, "lse"_a.none(),
        "grad_losses"_a.none(), "grad_output"_a.none() = none, "grad_lse"_a.none() = none,
        "grad_hidden"_a.none() = none, "grad_weight"_a.none() = none, "grad_bias"_a.none() = none,
        "update"_a.none() = none, "losses"_a.none() = none, "output"_a.none() = none, "gpu"_a.none() = none);
  m.def("sparse_logits", &logits, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "index"_a.none(),
        "bias"_a.none(), "group_size"_a = 1, "logits"_a.none(), "gpu"_a.none() = none);
  m.def("sparse_scores", &scores, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "index"_a.none(),
        "bias"_a.none(), "group_size"_a = 1, "classes"_a.none(), "scores"_a.none(), "gpu"_a.none() = none);
  m.def("sparse_topk", &topk, nb::kw_only(), "hidden"_a.none(), "weight"_a.none(), "index"_a.none(), "bias"_a.none(),
        "group_size"_a = 1, "k"_a, "exclude_indptr"_a.none() = none, "exclude_indices"_a.none() = none,
        "scores"_a.none(), "classes"_a.none(), "lse"_a.none() = none, "gpu"_a.none() = none);
  m.def("draw_index", &draw, nb::kw_only(), "index"_a.none(), "in_features"_a, "seed"_a, "first_row"_a = 0,
        "gpu"_a.none() = none);
  m.def("rewire", &move, nb::kw_only(), "weight"_a.none(), "index"_a.none(), "group_size"_a = 1, "in_features"_a,
        "first"_a.none() = none, "second"_a.none() = none, "compensation"_a.none() = none,
        "mode"_a = "magnitude_global", "fraction"_a = 0.1, "threshold"_a = 0.0, "keep_value"_a = false, "seed"_a,
        "step"_a, "first_row"_a = 0, "device_step"_a.none() = none, "moved"_a.none() = none, "gpu"_a.none() = none);
  m.def("check_index", &check, nb::kw_only(), "index"_a.none(), "in_features"_a, "gpu"_a.none() = none);
}

}  // namespace widehead::python
