// bag.cc -- the embedding bag for Python: a CSR batch, the table, and what the optimiser keeps
#include "widehead/bag.h"

#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

BagInput input_of(Arrays& arrays, nb::handle indptr, nb::handle indices, nb::handle values) {
  BagInput input;
  const ConstAnyVector p = arrays.vector(indptr, {"indptr", "[batch + 1]", one_of(Dtype::i64)});
  if (p.size < 1) throw ShapeError("indptr: expected [batch + 1] entries, got none");
  input.indptr = static_cast<const std::int64_t*>(p.data);
  input.rows = p.size - 1;
  input.indices = arrays.vector(indices, {"indices", "[nnz]", one_of(Dtype::i32) | one_of(Dtype::i64)});
  input.values = sized<float>(arrays.vector(values, {"values", "[nnz]", one_of(Dtype::f32), true}), input.indices.size,
                              "values", "[nnz]");
  return input;
}

void forward(nb::handle indptr, nb::handle indices, nb::handle values, nb::handle table, bool normalise, double scale,
             nb::handle out, nb::handle norms) {
  Arrays arrays;
  BagForward args;
  args.input = input_of(arrays, indptr, indices, values);
  args.table = arrays.matrix(table, {"table", "[n_features, dim]", kStored});
  args.normalise = normalise;
  args.scale = scale;
  args.out = arrays.out_matrix(out, {"out", "[batch, dim]", kResult});
  args.norms = arrays.out_vector(norms, {"norms", "[batch]", kResult, true});
  nb::gil_scoped_release no_gil;
  bag_forward(args);
}

void step(nb::handle indptr, nb::handle indices, nb::handle values, nb::handle table, bool normalise, double scale,
          nb::handle out, nb::handle norms, nb::handle grad, nb::handle update) {
  Arrays arrays;
  BagStep args;
  args.input = input_of(arrays, indptr, indices, values);
  args.table = arrays.out_matrix(table, {"table", "[n_features, dim]", kStored});
  args.normalise = normalise;
  args.scale = scale;
  args.out = arrays.matrix(out, {"out", "[batch, dim]", kResult, true});
  args.norms = arrays.vector(norms, {"norms", "[batch]", kResult, true});
  args.grad = arrays.matrix(grad, {"grad", "[batch, dim]", kResult});
  const Update parsed = parse_update(update, arrays);
  args.update = &parsed;
  nb::gil_scoped_release no_gil;
  bag_step(args);
}

}  // namespace

void bind_bag(nb::module_& m) {
  const nb::object none = nb::none();
  m.def("bag_forward", &forward, nb::kw_only(), "indptr"_a.none(), "indices"_a.none(), "values"_a.none(),
        "table"_a.none(), "normalise"_a, "scale"_a, "out"_a.none(), "norms"_a.none() = none);
  m.def("bag_step", &step, nb::kw_only(), "indptr"_a.none(), "indices"_a.none(), "values"_a.none(), "table"_a.none(),
        "normalise"_a, "scale"_a, "out"_a.none() = none, "norms"_a.none() = none, "grad"_a.none(), "update"_a);
}

}  // namespace widehead::python
