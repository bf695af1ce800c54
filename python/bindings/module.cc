// module.cc -- the private module widehead._core: errors, threads, instruction sets, random numbers, and the parts
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>

#include "parts.h"
#include "widehead/cuda.h"
#include "widehead/error.h"
#include "widehead/fault.h"
#include "widehead/isa.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead::python {
namespace {

// Translators are tried newest first: the base goes in before what derives from it.
void bind_errors(nb::module_& m) {
  nb::exception<Error> base(m, "Error", PyExc_RuntimeError);
  const auto with = [&](PyObject* second) { return nb::make_tuple(base, nb::handle(second)); };
  nb::exception<ShapeError> shape(m, "ShapeError", with(PyExc_ValueError));
  nb::exception<DtypeError> dtype(m, "DtypeError", with(PyExc_TypeError));
  nb::exception<LabelError> label(m, "LabelError", with(PyExc_ValueError));
  nb::exception<NonFiniteError> non_finite(m, "NonFiniteError", with(PyExc_ValueError));
  nb::exception<CapacityError> capacity(m, "CapacityError", with(PyExc_MemoryError));
  nb::exception<BackendError> backend(m, "BackendError", base);
  // Users meet them as widehead.ShapeError, so that is how tracebacks and pickles should call them.
  for (nb::object e : {nb::object(base), nb::object(shape), nb::object(dtype), nb::object(label),
                       nb::object(non_finite), nb::object(capacity), nb::object(backend)})
    e.attr("__module__") = "widehead";
}

// `record`: the five numbers of a FaultRecord, copied back from the device.
void raise(std::array<std::int64_t, 5> record) { raise_fault({record[0], record[1], record[2], record[3], record[4]}); }

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : supported_isas()) names.emplace_back(name_of(isa));
  return names;
}

std::array<std::uint32_t, 4> philox_block(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  const Philox4 r = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {r.v[0], r.v[1], r.v[2], r.v[3]};
}

}  // namespace
}  // namespace widehead::python

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  using namespace nanobind::literals;
  using namespace widehead::python;

  // A tensor that lives when Python ends keeps its autograd graph, and that the exact head's batch: no leak of ours.
  nb::set_leak_warnings(false);
  m.doc() = "The private module of widehead: its functions check arrays and call the core. See _core.pyi.";
  m.attr("__version__") = WIDEHEAD_VERSION;
  m.attr("cuda_built") = WIDEHEAD_CUDA_BUILT != 0;
  m.attr("cuda_emulated") = WIDEHEAD_CUDA_EMULATED != 0;  // kernels run on the host, on host memory: tests only
  m.attr("NON_FINITE") = static_cast<std::int64_t>(widehead::Fault::non_finite);
  m.attr("LABEL_RANGE") = static_cast<std::int64_t>(widehead::Fault::label_range);
  bind_errors(m);
  m.def("set_num_threads", &widehead::set_num_threads, "n"_a);
  m.def("get_num_threads", &widehead::get_num_threads);
  m.def("set_isa", [](const std::string& name) { widehead::set_isa(std::string_view(name)); }, "name"_a);
  m.def("current_isa", [] { return std::string(widehead::name_of(widehead::current_isa())); });
  m.def("supported_isas", &isa_names);
  m.def("raise_fault", &raise, "record"_a);
  m.def("set_cublas_path", &widehead::set_cublas_path, "path"_a);
  m.def("philox", &philox_block, nb::kw_only(), "counter"_a, "key"_a);
  bind_bag(m);
  bind_dense(m);
  bind_exact(m);
  bind_exact_device(m);
  bind_hash_index(m);
  bind_hashed(m);
  bind_ngrams(m);
  bind_rows(m);
  bind_sparse(m);
}
