// hashed.cc -- the hashed head's passes for Python
#include "widehead/hashed.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kDouble = one_of(Dtype::f64);
constexpr Dtypes kInt64 = one_of(Dtype::i64);
constexpr Dtypes kInt32 = one_of(Dtype::i32);

Estimator estimator_of(const std::string& name) {
  for (const Estimator e : {Estimator::restricted, Estimator::corrected, Estimator::importance})
    if (name == name_of(e)) return e;
  throw ShapeError("estimator: expected 'restricted', 'corrected' or 'importance', got '" + name + "'");
}

double* doubles(Arrays& arrays, nb::handle h, const char* name, std::int64_t size, bool optional = false) {
  const AnyVector v = arrays.out_vector(h, {name, "[batch]", kDouble, optional});
  if (v) check_size(v.size, size, name, "[batch]");
  return static_cast<double*>(v.data);
}

struct HashedHandle {
  std::shared_ptr<HashedBatch> batch;
};

HashedHandle forward(nb::handle hidden, nb::handle weight, nb::handle bias, nb::handle indptr, nb::handle indices,
                     nb::handle values, std::int64_t ignore_index, const std::string& estimator, nb::handle candidates,
                     nb::handle counts, int tables, nb::handle negatives, nb::handle losses, nb::handle lse,
                     nb::handle output) {
  Arrays arrays;
  HashedForward args;
  args.hidden = arrays.matrix(hidden, {"hidden", "[batch, in_features]", kFloating});
  args.weight = arrays.matrix(weight, {"weight", "[n_classes, in_features]", kStored});
  args.bias = arrays.vector(bias, {"bias", "[n_classes]", kStored, true});
  const std::int64_t rows = args.hidden.rows;
  args.target = labels_of(arrays, indptr, indices, values, rows, args.weight.rows);
  args.ignore_index = ignore_index;
  args.estimator = estimator_of(estimator);
  const ConstAnyMatrix c = arrays.matrix(candidates, {"candidates", "[batch, n]", kInt64, true});
  const ConstAnyMatrix n = arrays.matrix(counts, {"counts", "[batch, n]", kInt32, true});
  const auto like_candidates = [&](const ConstAnyMatrix& m, const char* name) {
    if (m && (m.rows != rows || m.cols != c.cols || m.stride != m.cols))
      throw ShapeError(std::string(name) + ": expected a contiguous array of shape [" + std::to_string(rows) + ", " +
                       std::to_string(c.cols) + "], got [" + std::to_string(m.rows) + ", " + std::to_string(m.cols) +
                       "]");
  };
  like_candidates(c, "candidates");
  like_candidates(n, "counts");
  args.candidates = static_cast<const std::int64_t*>(c.data);
  args.counts = static_cast<const std::int32_t*>(n.data);
  args.n_candidates = c.cols;
  args.tables = tables;
  const ConstAnyVector draws = arrays.vector(negatives, {"negatives", "[n]", kInt64, true});
  args.negatives = static_cast<const std::int64_t*>(draws.data);
  args.n_negatives = draws.size;
  args.losses = doubles(arrays, losses, "losses", rows);
  args.lse = doubles(arrays, lse, "lse", rows, true);
  args.output = doubles(arrays, output, "output", rows, true);
  nb::gil_scoped_release no_gil;
  return {hashed_forward(args)};
}

// How many rows of drift["moved"] were written.
std::int64_t backward(const HashedHandle& batch, nb::handle grad_losses, nb::handle weight, nb::handle bias,
                      nb::handle grad_hidden, nb::handle update, nb::handle drift, double drift_limit, nb::handle moved,
                      nb::handle grad_rows, nb::handle grad_bias) {
  Arrays arrays;
  HashedBackward args;
  args.batch = batch.batch.get();
  const std::int64_t examples = batch.batch->examples();
  args.grad_losses = sized<double>(arrays.vector(grad_losses, {"grad_losses", "[batch]", kDouble}), examples,
                                   "grad_losses", "[batch]");
  args.weight = arrays.out_matrix(weight, {"weight", "[n_classes, in_features]", kStored});
  args.bias = arrays.out_vector(bias, {"bias", "[n_classes]", kStored, true});
  args.grad_hidden = arrays.out_matrix(grad_hidden, {"grad_hidden", "[batch, in_features]", kFloating, true});
  args.grad_rows = arrays.out_matrix(grad_rows, {"grad_rows", "[rows, in_features]", kResult, true});
  args.grad_bias = arrays.out_vector(grad_bias, {"grad_bias", "[rows]", kResult, true});
  Update step;
  if (!update.is_none()) {
    step = parse_update(update, arrays);
    args.update = &step;
  }
  Drift far;
  const AnyVector sums = arrays.out_vector(drift, {"drift", "[n_classes]", one_of(Dtype::f32), true});
  if (sums) {
    check_size(sums.size, args.weight.rows, "drift", "[n_classes]");
    const AnyVector to = arrays.out_vector(moved, {"moved", "[rows]", kInt64});
    if (to.size < batch.batch->rows())
      throw ShapeError("moved: expected room for " + std::to_string(batch.batch->rows()) + " rows, got " +
                       std::to_string(to.size));
    far.sums = static_cast<float*>(sums.data);
    far.limit = drift_limit;
    far.moved = static_cast<std::int64_t*>(to.data);
    args.drift = &far;
  }
  nb::gil_scoped_release no_gil;
  hashed_backward(args);
  return far.n_moved;
}

void copy_rows(const HashedHandle& batch, nb::handle out) {
  Arrays arrays;
  const AnyVector to = arrays.out_vector(out, {"out", "[rows]", kInt64});
  check_size(to.size, batch.batch->rows(), "out", "[rows]");
  batch.batch->copy_rows(static_cast<std::int64_t*>(to.data));
}

}  // namespace

void bind_hashed(nb::module_& m) {
  nb::class_<HashedHandle>(m, "HashedBatch", "What a forward pass of the hashed head keeps; see hashed.h.")
      .def_prop_ro("pairs", [](const HashedHandle& b) { return b.batch->pairs(); })
      .def_prop_ro("rows", [](const HashedHandle& b) { return b.batch->rows(); })
      .def("copy_rows", &copy_rows, "out"_a);
  const nb::object none = nb::none();
  m.def("hashed_forward", &forward, nb::kw_only(), "hidden"_a, "weight"_a, "bias"_a.none() = none, "indptr"_a.none(),
        "indices"_a, "values"_a.none() = none, "ignore_index"_a = -100, "estimator"_a = "corrected",
        "candidates"_a.none() = none, "counts"_a.none() = none, "tables"_a = 1, "negatives"_a.none() = none, "losses"_a,
        "lse"_a.none() = none, "output"_a.none() = none);
  m.def("hashed_backward", &backward, "batch"_a, nb::kw_only(), "grad_losses"_a, "weight"_a, "bias"_a.none() = none,
        "grad_hidden"_a.none() = none, "update"_a.none() = none, "drift"_a.none() = none, "drift_limit"_a = 0.03,
        "moved"_a.none() = none, "grad_rows"_a.none() = none, "grad_bias"_a.none() = none);
}

}  // namespace widehead::python
