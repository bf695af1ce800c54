// hash_index.cc -- the hash index for Python
#include "widehead/hash_index.h"

#include <nanobind/stl/string.h>

#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

constexpr Dtypes kInt64 = one_of(Dtype::i64);
constexpr Dtypes kInt32 = one_of(Dtype::i32);

HashFamily family_of(const std::string& name) {
  for (const HashFamily family : {HashFamily::wta, HashFamily::dwta, HashFamily::simhash})
    if (name == name_of(family)) return family;
  throw ShapeError("family: expected 'wta', 'dwta' or 'simhash', got '" + name + "'");
}

class TheHashIndex {
 public:
  TheHashIndex(std::int64_t features, bool bias, const std::string& family, int tables, int hashes, int window,
               std::int64_t max_bucket, std::uint64_t seed)
      : index_(features, bias, {family_of(family), tables, hashes, window, max_bucket, seed}) {}

  void build(nb::handle weight, nb::handle bias) {
    Arrays arrays;
    const auto [w, b] = rows(arrays, weight, bias, "weight");
    nb::gil_scoped_release no_gil;
    index_.build(w, b);
  }

  std::int64_t update(nb::handle ids, nb::handle weight, nb::handle bias) {
    Arrays arrays;
    const ConstAnyVector i = arrays.vector(ids, {"ids", "[n]", kInt64});
    const auto [w, b] = rows(arrays, weight, bias, "weight");
    nb::gil_scoped_release no_gil;
    return index_.update(static_cast<const std::int64_t*>(i.data), i.size, w, b);
  }

  void query(nb::handle hidden, nb::handle ids, nb::handle counts, int probes, bool ranked) {
    Arrays arrays;
    HashQuery q;
    q.hidden = arrays.matrix(hidden, {"hidden", "[batch, in_features]", kFloating});
    const AnyMatrix out = arrays.out_matrix(ids, {"ids", "[batch, candidates]", kInt64});
    check_shape(out, q.hidden.rows, out.cols, "ids");
    const AnyMatrix met = arrays.out_matrix(counts, {"counts", "[batch, candidates]", kInt32, true});
    if (met) check_shape(met, q.hidden.rows, out.cols, "counts");
    q.candidates = out.cols;
    q.probes = probes;
    q.ranked = ranked;
    q.ids = static_cast<std::int64_t*>(out.data);
    q.counts = static_cast<std::int32_t*>(met.data);
    nb::gil_scoped_release no_gil;
    index_.query(q);
  }

  void keys(nb::handle of, nb::handle bias, nb::handle out) {
    Arrays arrays;
    const auto [r, b] = rows(arrays, of, bias, "rows");
    const AnyMatrix to = arrays.out_matrix(out, {"out", "[n, tables]", kInt32});
    check_shape(to, r.rows, index_.options().tables, "out");
    nb::gil_scoped_release no_gil;
    index_.keys(r, b, static_cast<std::int32_t*>(to.data));
  }

  nb::dict statistics() {
    HashStatistics s;
    {
      nb::gil_scoped_release no_gil;
      s = index_.statistics();
    }
    nb::dict out;
    out["rows"] = s.rows;
    out["absent"] = s.absent;
    out["buckets"] = s.buckets;
    out["used"] = s.used;
    out["largest"] = s.largest;
    out["spilled"] = s.spilled;
    out["bytes"] = s.bytes;
    out["rebuilds"] = s.rebuilds;
    return out;
  }

  std::int64_t rows() const { return index_.rows(); }

 private:
  static std::pair<ConstAnyMatrix, ConstAnyVector> rows(Arrays& arrays, nb::handle weight, nb::handle bias,
                                                        const char* name) {
    const ConstAnyMatrix w = arrays.matrix(weight, {name, "[n, in_features]", kStored});
    const ConstAnyVector b = arrays.vector(bias, {"bias", "[n]", kStored, true});
    if (arrays.on_gpu())
      throw BackendError(std::string(name) + ": expected an array on cpu, got one on cuda; move it to the CPU");
    return {w, b};
  }
  static void check_shape(const AnyMatrix& m, std::int64_t rows, std::int64_t cols, const char* name) {
    if (m.rows != rows || m.cols != cols || m.stride != m.cols)
      throw ShapeError(std::string(name) + ": expected a contiguous array of shape [" + std::to_string(rows) + ", " +
                       std::to_string(cols) + "], got [" + std::to_string(m.rows) + ", " + std::to_string(m.cols) +
                       "]");
  }

  HashIndex index_;
};

}  // namespace

void bind_hash_index(nb::module_& m) {
  nb::class_<TheHashIndex>(m, "HashIndex", "Hash tables over the rows of a matrix; see hash_index.h.")
      .def(nb::init<std::int64_t, bool, const std::string&, int, int, int, std::int64_t, std::uint64_t>(), "features"_a,
           nb::kw_only(), "bias"_a = false, "family"_a = "wta", "tables"_a = 50, "hashes"_a = 4, "window"_a = 8,
           "max_bucket"_a = 0, "seed"_a = 0)
      .def("build", &TheHashIndex::build, "weight"_a, "bias"_a.none() = nb::none())
      .def("update", &TheHashIndex::update, "ids"_a, "weight"_a, "bias"_a.none() = nb::none())
      .def("query", &TheHashIndex::query, "hidden"_a, nb::kw_only(), "ids"_a, "counts"_a.none() = nb::none(),
           "probes"_a = 0, "ranked"_a = true)
      .def("keys", &TheHashIndex::keys, "rows"_a, "bias"_a.none() = nb::none(), nb::kw_only(), "out"_a)
      .def("statistics", &TheHashIndex::statistics)
      .def_prop_ro("rows", [](const TheHashIndex& i) { return i.rows(); });
}

}  // namespace widehead::python
