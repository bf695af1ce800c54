// exact.cc -- the exact head for Python: an object that keeps the state beside the caller's arrays
#include "widehead/exact.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "parts.h"
#include "widehead/error.h"
#include "widehead/exact_device.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kDouble = one_of(Dtype::f64);
constexpr Dtypes kInt64 = one_of(Dtype::i64);

struct Batch {
  std::shared_ptr<ExactBatch> batch;
  std::int64_t rows, nnz;
};

double* doubles(Arrays& arrays, nb::handle h, const char* name, const char* axes, std::int64_t size,
                bool optional = false) {
  const AnyVector v = arrays.out_vector(h, {name, axes, kDouble, optional});
  if (!v) return nullptr;
  check_size(v.size, size, name, axes);
  return static_cast<double*>(v.data);
}

void on_cpu(const Arrays& arrays) {
  if (arrays.on_gpu())
    throw BackendError(
        "ExactState: expected arrays on cpu, got arrays on cuda, for which there are exact_init and the "
        "functions beside it; method 'woodbury' is for the CPU alone");
}

ExactMethod method_of(const std::string& name) {
  for (const ExactMethod method : {ExactMethod::blocked, ExactMethod::woodbury})
    if (name == name_of(method)) return method;
  throw ShapeError("method: expected 'blocked' or 'woodbury', got '" + name + "'");
}

class State {
 public:
  State(nb::handle weight, nb::handle velocity, const std::string& method, bool wide, std::int64_t block_steps,
        std::int64_t radix, double max_kappa)
      : weight_(arrays_.out_matrix(weight, {"weight", "[n_classes, in_features]", kResult})),
        head_(make(arrays_, weight_,
                   arrays_.out_matrix(velocity, {"velocity", "[n_classes, in_features]", kResult, true}),
                   {method_of(method), wide, block_steps, radix, max_kappa})) {}

  Batch forward(nb::handle hidden, nb::handle indptr, nb::handle indices, nb::handle values, bool train, nb::handle A,
                nb::handle q, nb::handle s) {
    Arrays arrays;
    const ConstAnyMatrix h = arrays.matrix(hidden, {"hidden", "[batch, in_features]", kFloating});
    const Labels target = labels_of(arrays, indptr, indices, values, h.rows, weight_.rows);
    const std::int64_t nnz = target.indptr ? target.size : h.rows;
    double* a = doubles(arrays, A, "A", "[nnz]", nnz);
    double *qs = doubles(arrays, q, "q", "[batch]", h.rows), *ss = doubles(arrays, s, "s", "[batch]", h.rows);
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    return {head_.forward(h, target, train, a, qs, ss), h.rows, nnz};
  }

  void backward(const Batch& batch, nb::handle grad_A, nb::handle grad_q, nb::handle grad_s, nb::handle grad_hidden) {
    Arrays arrays;
    const auto numbers = [&](nb::handle h, const char* name, const char* axes, std::int64_t size) {
      return sized<double>(arrays.vector(h, {name, axes, kDouble}), size, name, axes);
    };
    const double* a = numbers(grad_A, "grad_A", "[nnz]", batch.nnz);
    const double *q = numbers(grad_q, "grad_q", "[batch]", batch.rows),
                 *s = numbers(grad_s, "grad_s", "[batch]", batch.rows);
    const AnyMatrix out = arrays.out_matrix(grad_hidden, {"grad_hidden", "[batch, in_features]", kFloating, true});
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    head_.backward(*batch.batch, a, q, s, out);
  }

  void step(double lr, double weight_decay, double momentum, nb::handle column_scale) {
    Arrays arrays;
    const ConstAnyVector c = arrays.vector(column_scale, {"column_scale", "[in_features]", kDouble, true});
    const double* scale = sized<double>(c, weight_.cols, "column_scale", "[in_features]");
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    head_.step({lr, weight_decay, momentum, scale});
  }

  void rows(nb::handle ids, nb::handle out) {
    Arrays arrays;
    const ConstAnyVector i = arrays.vector(ids, {"ids", "[n]", kInt64});
    const AnyMatrix to = arrays.out_matrix(out, {"out", "[n, in_features]", kFloating});
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    head_.rows(static_cast<const std::int64_t*>(i.data), i.size, to);
  }

  void grad_columns(nb::handle out) {
    Arrays arrays;
    double* to = doubles(arrays, out, "out", "[in_features]", weight_.cols);
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    head_.grad_columns(to);
  }

  nb::dict diagnostics() {
    ExactDiagnostics d;
    {
      nb::gil_scoped_release no_gil;
      d = head_.diagnostics();
    }
    nb::dict out;
    out["steps"] = d.steps;
    out["blocks"] = d.blocks;
    out["matrices"] = d.matrices;
    out["hot_rows"] = d.hot_rows;
    out["fetched"] = d.fetched;
    out["row_products"] = d.row_products;
    out["gram_error"] = d.gram_error;
    out["weight_norm2"] = d.weight_norm2;
    out["listed"] = d.listed;
    out["kappa"] = d.kappa;
    out["plain_steps"] = d.plain_steps;
    return out;
  }

  ExactHead& head() { return head_; }

 private:
  static ExactHead make(const Arrays& arrays, AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options) {
    on_cpu(arrays);
    nb::gil_scoped_release no_gil;
    return ExactHead(weight, velocity, options);
  }

  Arrays arrays_;  // keeps the caller's memory
  AnyMatrix weight_;
  ExactHead head_;
};

SphericalOptions options_of(const std::string& loss, double eps, double a, double b) {
  for (SphericalLoss kind : {SphericalLoss::squared_error, SphericalLoss::spherical_softmax,
                             SphericalLoss::taylor_softmax, SphericalLoss::z_loss})
    if (loss == name_of(kind)) return {kind, eps, a, b};
  throw ShapeError("loss: expected 'squared_error', 'spherical_softmax', 'taylor_softmax' or 'z_loss', got '" + loss +
                   "'");
}

void loss(const std::string& name, double eps, double a, double b, std::int64_t n_classes, nb::handle indptr,
          nb::handle indices, nb::handle values, nb::handle A, nb::handle q, nb::handle s, nb::handle losses,
          nb::handle grad_A, nb::handle grad_q, nb::handle grad_s, std::optional<std::int64_t> ignore_index,
          nb::handle gpu) {
  Arrays arrays;
  const SphericalOptions options = options_of(name, eps, a, b);
  const ConstAnyVector qs = arrays.vector(q, {"q", "[batch]", kDouble});
  const Labels target = labels_of(arrays, indptr, indices, values, qs.size, n_classes);
  const std::int64_t nnz = target.indptr ? target.size : qs.size;
  const double* as = sized<double>(arrays.vector(A, {"A", "[nnz]", kDouble}), nnz, "A", "[nnz]");
  const double* ss = sized<double>(arrays.vector(s, {"s", "[batch]", kDouble}), qs.size, "s", "[batch]");
  double* l = doubles(arrays, losses, "losses", "[batch]", qs.size, true);
  double* ga = doubles(arrays, grad_A, "grad_A", "[nnz]", nnz, true);
  double* gq = doubles(arrays, grad_q, "grad_q", "[batch]", qs.size, true);
  double* gs = doubles(arrays, grad_s, "grad_s", "[batch]", qs.size, true);
  if (arrays.on_gpu()) {
    SphericalLossDevice args{options, target, as, static_cast<const double*>(qs.data), ss, l, ga, gq, gs, {}};
    args.device = arrays.device(gpu);
    args.ignore_index = ignore_index.value_or(args.ignore_index);
    arrays.get_scratch(gpu, args.device, scratch_bytes(args));
    nb::gil_scoped_release no_gil;
    return spherical_loss(args);
  }
  nb::gil_scoped_release no_gil;
  spherical_loss(options, target, as, static_cast<const double*>(qs.data), ss, l, ga, gq, gs);
}

}  // namespace

void bind_exact(nb::module_& m) {
  nb::class_<Batch>(m, "ExactBatch", "What a forward pass of the exact head keeps for its backward pass.");
  nb::class_<State>(m, "ExactState", "The exact head's state beside its weight; see exact.h.")
      .def(nb::init<nb::handle, nb::handle, const std::string&, bool, std::int64_t, std::int64_t, double>(), "weight"_a,
           "velocity"_a.none() = nb::none(), nb::kw_only(), "method"_a = "blocked", "wide"_a = false,
           "block_steps"_a = 4, "radix"_a = 8, "max_kappa"_a = 4.0)
      .def("forward", &State::forward, nb::kw_only(), "hidden"_a, "indptr"_a.none(), "indices"_a,
           "values"_a.none() = nb::none(), "train"_a, "A"_a, "q"_a, "s"_a)
      .def("backward", &State::backward, "batch"_a, nb::kw_only(), "grad_A"_a, "grad_q"_a, "grad_s"_a,
           "grad_hidden"_a.none() = nb::none())
      .def("step", &State::step, nb::kw_only(), "lr"_a, "weight_decay"_a = 0.0, "momentum"_a = 0.0,
           "column_scale"_a.none() = nb::none())
      .def("rows", &State::rows, "ids"_a, "out"_a)
      .def("grad_norm2", [](State& s) { return s.head().grad_norm2(); })
      .def("grad_columns", &State::grad_columns, "out"_a)
      .def(
          "scale_grad", [](State& s, double factor) { s.head().scale_grad(factor); }, "factor"_a)
      .def("zero_grad", [](State& s) { s.head().zero_grad(); })
      .def("pending", [](State& s) { return s.head().pending(); })
      .def("consolidate",
           [](State& s) {
             nb::gil_scoped_release no_gil;
             s.head().consolidate();
           })
      .def("refresh",
           [](State& s) {
             nb::gil_scoped_release no_gil;
             s.head().refresh();
           })
      .def("diagnostics", &State::diagnostics);
  m.def("spherical_loss", &loss, nb::kw_only(), "loss"_a, "eps"_a, "a"_a, "b"_a, "n_classes"_a, "indptr"_a.none(),
        "indices"_a, "values"_a.none() = nb::none(), "A"_a, "q"_a, "s"_a, "losses"_a.none() = nb::none(),
        "grad_A"_a.none() = nb::none(), "grad_q"_a.none() = nb::none(), "grad_s"_a.none() = nb::none(),
        "ignore_index"_a.none() = nb::none(), "gpu"_a.none() = nb::none());
}

}  // namespace widehead::python
