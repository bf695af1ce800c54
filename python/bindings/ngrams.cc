// ngrams.cc -- hashed character n-grams and typing errors; strings come as code points in one int32 array
#include "widehead/ngrams.h"

#include <memory>
#include <string>
#include <utility>

#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {
namespace {

using namespace nanobind::literals;

// An argument is the pair (text [length] int32, offsets [strings + 1] int64).
Strings strings_of(Arrays& arrays, nb::handle pair, const char* name) {
  if (!nb::isinstance<nb::tuple>(pair) || nb::len(pair) != 2)
    throw DtypeError(std::string(name) + ": expected a pair (text, offsets)");
  const auto t = arrays.vector(pair[0], {name, "text [length]", one_of(Dtype::i32)});
  const auto o = arrays.vector(pair[1], {name, "offsets [strings + 1]", one_of(Dtype::i64)});
  const auto* p = static_cast<const std::int64_t*>(o.data);
  if (o.size < 1 || p[0] < 0 || p[o.size - 1] > t.size)
    throw ShapeError(std::string(name) + ": expected at least one offset, from 0 to the length of text");
  return {static_cast<const std::uint32_t*>(t.data), p, o.size - 1};
}

// Hands an array of the core over to Python, which frees it.
template <class Out, class T>
nb::ndarray<nb::numpy, Out> give(std::unique_ptr<T[]> data, std::int64_t size) {
  T* p = data.release();
  nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<T*>(q); });
  return nb::ndarray<nb::numpy, Out>(p, {static_cast<std::size_t>(size)}, owner);
}

NgramNorm norm_of(const std::string& name) {
  if (name == "none") return NgramNorm::none;
  if (name == "l1") return NgramNorm::l1;
  if (name == "l2") return NgramNorm::l2;
  throw ShapeError("norm: expected \"l1\", \"l2\" or None, got \"" + name + "\"");
}

nb::tuple give(OwnedStrings strings) {
  const std::int64_t length = strings.offsets[static_cast<std::size_t>(strings.size)];
  auto text = give<std::int32_t>(std::move(strings.text), length);
  return nb::make_tuple(std::move(text), give<std::int64_t>(std::move(strings.offsets), strings.size + 1));
}

nb::tuple ngrams(nb::handle text, nb::handle romanised, std::int64_t n_features, int min_n, int max_n, bool words,
                 bool whole_words, bool separate, bool binary, const std::string& norm) {
  Arrays arrays;
  const Strings strings = strings_of(arrays, text, "text");
  const NgramOptions options{n_features, min_n, max_n, words, whole_words, separate, binary, norm_of(norm)};
  Strings roman;
  if (!romanised.is_none()) roman = strings_of(arrays, romanised, "romanised");
  NgramRows rows;
  {
    nb::gil_scoped_release release;
    rows = hash_ngrams(strings, romanised.is_none() ? nullptr : &roman, options);
  }
  return nb::make_tuple(give<std::int64_t>(std::move(rows.indptr), strings.size + 1),
                        give<std::int32_t>(std::move(rows.indices), rows.nnz),
                        give<float>(std::move(rows.values), rows.nnz));
}

nb::tuple replace(nb::handle text, nb::handle table) {
  Arrays arrays;
  const Strings strings = strings_of(arrays, text, "text"), replacements = strings_of(arrays, table, "table");
  OwnedStrings out;
  {
    nb::gil_scoped_release release;
    out = transliterate(strings, replacements);
  }
  return give(std::move(out));
}

nb::tuple typos(nb::handle text, double rate, double second, std::uint64_t seed, std::uint64_t step,
                std::int64_t first_row) {
  Arrays arrays;
  const Strings strings = strings_of(arrays, text, "text");
  OwnedStrings out;
  {
    nb::gil_scoped_release release;
    out = add_typos(strings, {rate, second, seed, step, first_row});
  }
  return give(std::move(out));
}

}  // namespace

void bind_ngrams(nb::module_& m) {
  m.def("ngrams", &ngrams, nb::kw_only(), "text"_a, "romanised"_a.none(), "n_features"_a, "min_n"_a, "max_n"_a,
        "words"_a, "whole_words"_a, "separate"_a, "binary"_a, "norm"_a);
  m.def("transliterate", &replace, nb::kw_only(), "text"_a, "table"_a);
  m.def("typos", &typos, nb::kw_only(), "text"_a, "rate"_a, "second"_a, "seed"_a, "step"_a, "first_row"_a);
}

}  // namespace widehead::python
