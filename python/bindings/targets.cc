// targets.cc -- targets and loss options as Python gives them, for every head
#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {

Labels labels_of(Arrays& arrays, nb::handle indptr, nb::handle indices, nb::handle values, std::int64_t rows,
                 std::int64_t n_classes) {
  constexpr Dtypes i64 = one_of(Dtype::i64);
  const ConstAnyVector p = arrays.vector(indptr, {"indptr", "[batch + 1]", i64, true});
  const ConstAnyVector i = arrays.vector(indices, {"indices", p ? "[nnz]" : "[batch]", i64});
  const ConstAnyVector v = arrays.vector(values, {"values", "[nnz]", one_of(Dtype::f32), true});
  Labels labels;
  labels.rows = rows;
  labels.n_classes = n_classes;
  labels.indptr = sized<std::int64_t>(p, rows + 1, "indptr", "[batch + 1]");
  if (p) {
    // On the GPU the last row pointer cannot be read here: there the caller vouches for it.
    if (!arrays.on_gpu() && labels.indptr[rows] != i.size)
      throw LabelError("indptr: expected its last entry to be the number of indices " + std::to_string(i.size) +
                       ", got " + std::to_string(labels.indptr[rows]));
    labels.indices = static_cast<const std::int64_t*>(i.data);
    labels.size = i.size;
    labels.values = sized<float>(v, i.size, "values", "[nnz]");
  } else {
    if (v) throw ShapeError("values: expected None without indptr: single-label targets have no weights");
    labels.indices = sized<std::int64_t>(i, rows, "indices", "[batch]");
  }
  return labels;
}

Labels labels_of(Arrays& arrays, nb::handle indptr, nb::handle indices, nb::handle values, std::int64_t rows,
                 std::int64_t held, std::optional<std::int64_t> n_classes, std::optional<std::int64_t> first_class) {
  Labels labels = labels_of(arrays, indptr, indices, values, rows, n_classes.value_or(held));
  labels.part = first_class.has_value();
  labels.first_class = first_class.value_or(0);
  return labels;
}

LossOptions loss_of(Arrays& arrays, const std::string& loss, double label_smoothing, double lse_penalty, double softcap,
                    nb::handle class_weight, std::int64_t ignore_index, std::int64_t n_classes) {
  const ConstAnyVector w = arrays.vector(class_weight, {"class_weight", "[n_classes]", one_of(Dtype::f32), true});
  LossOptions options;
  options.kind = parse_loss(loss);
  options.label_smoothing = label_smoothing;
  options.lse_penalty = lse_penalty;
  options.softcap = softcap;
  options.class_weight = sized<float>(w, n_classes, "class_weight", "[n_classes]");
  options.ignore_index = ignore_index;
  return options;
}

Loss parse_loss(const std::string& name) {
  for (Loss loss : {Loss::softmax, Loss::bce, Loss::squared_hinge})
    if (name == name_of(loss)) return loss;
  throw ShapeError("loss: expected 'softmax', 'bce' or 'squared_hinge', got '" + name + "'");
}

}  // namespace widehead::python
