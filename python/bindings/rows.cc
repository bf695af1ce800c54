// rows.cc -- rows of weights and the negatives of sampled softmax for Python
#include "widehead/rows.h"

#include <nanobind/stl/string.h>

#include "parts.h"
#include "widehead/error.h"
#include "widehead/sampling.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kInt64 = one_of(Dtype::i64);

void on_cpu(const Arrays& arrays, const char* function) {
  if (arrays.on_gpu())
    throw BackendError(std::string(function) + ": expected arrays on cpu, got arrays on cuda; move them to the CPU");
}

void gather(nb::handle weight, nb::handle rows, nb::handle out, nb::handle gpu) {
  Arrays arrays;
  GatherRows args;
  args.weight = arrays.matrix(weight, {"weight", "[n_classes, in_features]", kStored});
  const ConstAnyVector r = arrays.vector(rows, {"rows", "[n]", kInt64});
  args.rows = static_cast<const std::int64_t*>(r.data);
  args.n = r.size;
  args.out = arrays.out_matrix(out, {"out", "[n, in_features]", kStored});
  args.device = arrays.device(gpu);
  nb::gil_scoped_release no_gil;
  gather_rows(args);
}

void update(nb::handle weight, nb::handle rows, nb::handle grad, nb::handle bias, nb::handle grad_bias,
            nb::handle update, nb::handle gpu) {
  Arrays arrays;
  UpdateRows args;
  args.weight = arrays.out_matrix(weight, {"weight", "[n_classes, in_features]", kStored});
  args.bias = arrays.out_vector(bias, {"bias", "[n_classes]", kStored, true});
  const ConstAnyVector r = arrays.vector(rows, {"rows", "[n]", kInt64});
  args.rows = static_cast<const std::int64_t*>(r.data);
  args.n = r.size;
  args.grad = arrays.matrix(grad, {"grad", "[n, in_features]", kStored});
  args.grad_bias = arrays.vector(grad_bias, {"grad_bias", "[n]", kStored, true});
  const Update step = parse_update(update, arrays);
  args.update = &step;
  args.device = arrays.device(gpu);
  arrays.get_scratch(gpu, args.device, scratch_bytes(args));
  nb::gil_scoped_release no_gil;
  update_rows(args);
}

void sample(nb::handle draws, std::int64_t n_classes, const std::string& proposal, nb::handle threshold,
            nb::handle alias, std::uint64_t seed, std::uint64_t step, nb::handle device_seed, nb::handle gpu) {
  Arrays arrays;
  SampleClasses args;
  const AnyVector d = arrays.out_vector(draws, {"draws", "[n]", kInt64});
  args.draws = static_cast<std::int64_t*>(d.data);
  args.n = d.size;
  args.n_classes = n_classes;
  bool known = false;
  for (Proposal p : {Proposal::uniform, Proposal::log_uniform, Proposal::alias})
    if (proposal == name_of(p)) {
      args.proposal = p;
      known = true;
    }
  if (!known) throw ShapeError("proposal: expected 'uniform', 'log_uniform' or 'alias', got '" + proposal + "'");
  args.threshold = sized<float>(arrays.vector(threshold, {"threshold", "[n_classes]", one_of(Dtype::f32), true}),
                                n_classes, "threshold", "[n_classes]");
  args.alias = sized<std::int64_t>(arrays.vector(alias, {"alias", "[n_classes]", kInt64, true}), n_classes, "alias",
                                   "[n_classes]");
  args.seed = seed;
  args.step = step;
  args.device_seed =
      sized<std::int64_t>(arrays.vector(device_seed, {"device_seed", "[1]", kInt64, true}), 1, "device_seed", "[1]");
  args.device = arrays.device(gpu);
  nb::gil_scoped_release no_gil;
  sample_classes(args);
}

void alias_table(nb::handle weight, nb::handle threshold, nb::handle alias) {
  Arrays arrays;
  const ConstAnyVector w = arrays.vector(weight, {"weight", "[n_classes]", one_of(Dtype::f64)});
  const AnyVector t = arrays.out_vector(threshold, {"threshold", "[n_classes]", one_of(Dtype::f32)});
  const AnyVector a = arrays.out_vector(alias, {"alias", "[n_classes]", kInt64});
  check_size(t.size, w.size, "threshold", "[n_classes]");
  check_size(a.size, w.size, "alias", "[n_classes]");
  on_cpu(arrays, "alias_table");
  nb::gil_scoped_release no_gil;
  make_alias_table(static_cast<const double*>(w.data), w.size, static_cast<float*>(t.data),
                   static_cast<std::int64_t*>(a.data));
}

void init(nb::handle out, double low, double high, std::uint64_t seed, std::int64_t first_row, nb::handle gpu) {
  Arrays arrays;
  const AnyMatrix view = arrays.out_matrix(out, {"out", "[rows, cols]", kStored});
  const Device device = arrays.device(gpu);
  nb::gil_scoped_release no_gil;
  init_uniform(view, low, high, seed, first_row, device);
}

}  // namespace

void bind_rows(nb::module_& m) {
  const nb::object none = nb::none();
  m.def("gather_rows", &gather, nb::kw_only(), "weight"_a.none(), "rows"_a.none(), "out"_a.none(),
        "gpu"_a.none() = none);
  m.def("update_rows", &update, nb::kw_only(), "weight"_a.none(), "rows"_a.none(), "grad"_a.none(),
        "bias"_a.none() = none, "grad_bias"_a.none() = none, "update"_a.none(), "gpu"_a.none() = none);
  m.def("sample_classes", &sample, nb::kw_only(), "draws"_a.none(), "n_classes"_a, "proposal"_a,
        "threshold"_a.none() = none, "alias"_a.none() = none, "seed"_a, "step"_a, "device_seed"_a.none() = none,
        "gpu"_a.none() = none);
  m.def("alias_table", &alias_table, nb::kw_only(), "weight"_a.none(), "threshold"_a.none(), "alias"_a.none());
  m.def("init_uniform", &init, nb::kw_only(), "out"_a.none(), "low"_a, "high"_a, "seed"_a, "first_row"_a = 0,
        "gpu"_a.none() = none);
}

}  // namespace widehead::python
