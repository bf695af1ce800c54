// exact_device.cc -- the exact head on a GPU for Python: functions over arrays of the caller's
#include "widehead/exact_device.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "parts.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kDouble = one_of(Dtype::f64);
constexpr Dtypes kInt64 = one_of(Dtype::i64);

double* doubles(Arrays& arrays, nb::handle h, const char* name, const char* axes, std::int64_t size,
                bool optional = false) {
  const AnyVector v = arrays.out_vector(h, {name, axes, kDouble, optional});
  if (v) check_size(v.size, size, name, axes);
  return static_cast<double*>(v.data);
}
const double* numbers(Arrays& arrays, nb::handle h, const char* name, const char* axes, std::int64_t size,
                      bool optional = false) {
  return sized<double>(arrays.vector(h, {name, axes, kDouble, optional}), size, name, axes);
}

// The rows alone, as exact_state_bytes looks at them.
ExactDevice rows_of(Arrays& arrays, nb::handle weight, nb::handle velocity, bool wide) {
  ExactDevice head;
  head.weight = arrays.out_matrix(weight, {"weight", "[n_classes, in_features]", kResult});
  head.velocity = arrays.out_matrix(velocity, {"velocity", "[n_classes, in_features]", kResult, true});
  head.wide = wide;
  return head;
}
ExactDevice head_of(Arrays& arrays, nb::handle weight, nb::handle velocity, nb::handle state, bool wide,
                    nb::handle gpu) {
  ExactDevice head = rows_of(arrays, weight, velocity, wide);
  const AnyVector memory = arrays.out_vector(state, {"state", "[n]", kInt64});
  head.state = memory.data;
  head.state_bytes = memory.size * 8;
  head.device = arrays.device(gpu);
  return head;
}
template <class Args>
void take_batch(Arrays& arrays, nb::handle batch, Args& args) {
  const AnyVector memory = arrays.out_vector(batch, {"batch", "[n]", kInt64});
  args.batch = memory.data;
  args.batch_bytes = memory.size * 8;
}

std::int64_t state_bytes(nb::handle weight, nb::handle velocity, bool wide, nb::handle gpu) {
  Arrays arrays;
  ExactDevice head = rows_of(arrays, weight, velocity, wide);
  head.device = arrays.device(gpu);
  return exact_state_bytes(head);
}

std::int64_t batch_bytes(nb::handle weight, nb::handle velocity, bool wide, std::int64_t examples, std::int64_t targets,
                         nb::handle gpu) {
  Arrays arrays;
  ExactDevice head = rows_of(arrays, weight, velocity, wide);
  head.device = arrays.device(gpu);
  return exact_batch_bytes(head, examples, targets);
}

void init(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle gpu) {
  Arrays arrays;
  ExactDevice head = head_of(arrays, weight, velocity, state, wide, gpu);
  arrays.get_scratch(gpu, head.device, exact_init_scratch(head));
  nb::gil_scoped_release no_gil;
  exact_init(head);
}

void forward(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle batch, nb::handle hidden,
             nb::handle indptr, nb::handle indices, std::optional<std::int64_t> ignore_index, nb::handle A,
             nb::handle q, nb::handle s, nb::handle gpu) {
  Arrays arrays;
  ExactForward args;
  args.ignore_index = ignore_index.value_or(args.ignore_index);
  args.head = head_of(arrays, weight, velocity, state, wide, gpu);
  take_batch(arrays, batch, args);
  args.hidden = arrays.matrix(hidden, {"hidden", "[batch, in_features]", kFloating});
  const std::int64_t rows = args.hidden.rows;
  args.target = labels_of(arrays, indptr, indices, nb::none(), rows, args.head.weight.rows);
  args.A = doubles(arrays, A, "A", "[nnz]", args.target.indptr ? args.target.size : rows);
  args.q = doubles(arrays, q, "q", "[batch]", rows);
  args.s = doubles(arrays, s, "s", "[batch]", rows);
  arrays.get_scratch(gpu, args.head.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  exact_forward(args);
}

void backward(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle batch, nb::handle grad_A,
              nb::handle grad_q, nb::handle grad_s, nb::handle grad_hidden, nb::handle gpu) {
  Arrays arrays;
  ExactBackward args;
  args.head = head_of(arrays, weight, velocity, state, wide, gpu);
  take_batch(arrays, batch, args);
  const ConstAnyVector a = arrays.vector(grad_A, {"grad_A", "[nnz]", kDouble});
  const ConstAnyVector q = arrays.vector(grad_q, {"grad_q", "[batch]", kDouble});
  args.examples = q.size;
  args.targets = a.size;
  args.grad_A = static_cast<const double*>(a.data);
  args.grad_q = static_cast<const double*>(q.data);
  args.grad_s = numbers(arrays, grad_s, "grad_s", "[batch]", q.size);
  args.grad_hidden = arrays.out_matrix(grad_hidden, {"grad_hidden", "[batch, in_features]", kFloating, true});
  nb::gil_scoped_release no_gil;
  exact_backward(args);
}

void gradient(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle batch,
              std::int64_t examples, std::int64_t targets, nb::handle norm2, nb::handle columns, nb::handle gpu) {
  Arrays arrays;
  ExactGradient args;
  args.head = head_of(arrays, weight, velocity, state, wide, gpu);
  take_batch(arrays, batch, args);
  args.examples = examples;
  args.targets = targets;
  args.norm2 = doubles(arrays, norm2, "norm2", "[1]", 1, true);
  args.columns = doubles(arrays, columns, "columns", "[in_features]", args.head.weight.cols, true);
  arrays.get_scratch(gpu, args.head.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  exact_gradient(args);
}

void step(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle batch, std::int64_t examples,
          std::int64_t targets, double lr, double weight_decay, double momentum, nb::handle device_lr,
          nb::handle grad_scale, nb::handle column_scale, nb::handle gpu) {
  Arrays arrays;
  ExactDeviceStep args;
  args.head = head_of(arrays, weight, velocity, state, wide, gpu);
  take_batch(arrays, batch, args);
  args.examples = examples;
  args.targets = targets;
  args.lr = lr;
  args.weight_decay = weight_decay;
  args.momentum = momentum;
  args.device_lr =
      sized<float>(arrays.vector(device_lr, {"device_lr", "[1]", one_of(Dtype::f32), true}), 1, "device_lr", "[1]");
  args.grad_scale = numbers(arrays, grad_scale, "grad_scale", "[1]", 1, true);
  args.column_scale = numbers(arrays, column_scale, "column_scale", "[in_features]", args.head.weight.cols, true);
  arrays.get_scratch(gpu, args.head.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  exact_step(args);
}

void rows(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle ids, nb::handle out,
          nb::handle gpu) {
  Arrays arrays;
  ExactRows args;
  args.head = head_of(arrays, weight, velocity, state, wide, gpu);
  const ConstAnyVector i = arrays.vector(ids, {"ids", "[n]", kInt64});
  args.ids = static_cast<const std::int64_t*>(i.data);
  args.n = i.size;
  args.out = arrays.out_matrix(out, {"out", "[n, in_features]", kFloating});
  arrays.get_scratch(gpu, args.head.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  exact_rows(args);
}

void consolidate(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle gpu) {
  Arrays arrays;
  ExactDevice head = head_of(arrays, weight, velocity, state, wide, gpu);
  arrays.get_scratch(gpu, head.device, exact_consolidate_scratch(head));
  nb::gil_scoped_release no_gil;
  exact_consolidate(head);
}

void gram(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle squares, nb::handle sums,
          nb::handle gpu) {
  Arrays arrays;
  const ExactDevice head = head_of(arrays, weight, velocity, state, wide, gpu);
  const std::int64_t width = head.weight.cols * (head.velocity ? 2 : 1);
  double* const q = doubles(arrays, squares, "squares", "[width * width]", width * width, true);
  double* const s = doubles(arrays, sums, "sums", "[width]", width, true);
  nb::gil_scoped_release no_gil;
  exact_gram(head, q, s);
}

void diagnostics(nb::handle weight, nb::handle velocity, nb::handle state, bool wide, nb::handle out, nb::handle gpu) {
  Arrays arrays;
  const ExactDevice head = head_of(arrays, weight, velocity, state, wide, gpu);
  double* const to = doubles(arrays, out, "out", "[6]", kExactDiagnostics);
  nb::gil_scoped_release no_gil;
  exact_diagnostics(head, to);
}

}  // namespace

void bind_exact_device(nb::module_& m) {
  const nb::object none = nb::none();
  m.def("exact_state_bytes", &state_bytes, nb::kw_only(), "weight"_a, "velocity"_a.none() = none, "wide"_a = false,
        "gpu"_a.none() = none);
  m.def("exact_batch_bytes", &batch_bytes, nb::kw_only(), "weight"_a, "velocity"_a.none() = none, "wide"_a = false,
        "examples"_a, "targets"_a, "gpu"_a.none() = none);
  const auto def = [&](const char* name, auto function, auto... more) {
    m.def(name, function, nb::kw_only(), "weight"_a, "velocity"_a.none() = none, "state"_a, "wide"_a = false, more...,
          "gpu"_a.none() = none);
  };
  def("exact_init", &init);
  def("exact_forward", &forward, "batch"_a, "hidden"_a, "indptr"_a.none(), "indices"_a, "ignore_index"_a.none() = none,
      "A"_a, "q"_a, "s"_a);
  def("exact_backward", &backward, "batch"_a, "grad_A"_a, "grad_q"_a, "grad_s"_a, "grad_hidden"_a.none() = none);
  def("exact_gradient", &gradient, "batch"_a, "examples"_a, "targets"_a, "norm2"_a.none() = none,
      "columns"_a.none() = none);
  def("exact_step", &step, "batch"_a, "examples"_a, "targets"_a, "lr"_a, "weight_decay"_a = 0.0, "momentum"_a = 0.0,
      "device_lr"_a.none() = none, "grad_scale"_a.none() = none, "column_scale"_a.none() = none);
  def("exact_rows", &rows, "ids"_a, "out"_a);
  def("exact_consolidate", &consolidate);
  def("exact_gram", &gram, "squares"_a.none() = none, "sums"_a.none() = none);
  def("exact_diagnostics", &diagnostics, "out"_a);
}

}  // namespace widehead::python
