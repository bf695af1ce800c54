// exact.cc -- the exact head's state by the types of its rows and of its factors
#include "cpu/exact_blocked.h"
#include "cpu/exact_woodbury.h"
#include "widehead/random.h"

namespace widehead::cpu {
namespace {

// read(x) of every element of a type T, row by row.
template <class T, class Real, class Read>
void read_as(const ConstAnyMatrix& from, Read read, Dense<Real>& out) {
  for (i64 r = 0; r < from.rows; ++r) {
    const T* in = static_cast<const T*>(from.data) + r * from.stride;
    Real* to = out.row(r);
    for (i64 k = 0; k < from.cols; ++k) to[k] = static_cast<Real>(read(in[k]));
  }
}

template <class Real>
void read_any(const ConstAnyMatrix& from, Dense<Real>& out) {
  out.resize(from.rows, from.cols);
  switch (from.dtype) {
    case Dtype::f64: read_as<double>(from, [](double x) { return x; }, out); break;
    case Dtype::bf16: read_as<std::uint16_t>(from, [](std::uint16_t x) { return bf16_float(x); }, out); break;
    case Dtype::f16: read_as<std::uint16_t>(from, [](std::uint16_t x) { return f16_float(x); }, out); break;
    default: read_as<float>(from, [](float x) { return x; }, out);
  }
}

template <class T, class Real, class Round>
void narrow(const Dense<Real>& rows, i64 columns, Round round, const AnyMatrix& out) {
  for (i64 r = 0; r < rows.rows; ++r) {
    const Real* in = rows.row(r);
    T* to = static_cast<T*>(out.data) + r * out.stride;
    for (i64 k = 0; k < columns; ++k) to[k] = round(in[k]);
  }
}

template <class Real>
void store(const Dense<Real>& rows, i64 columns, const AnyMatrix& out) {
  switch (out.dtype) {
    case Dtype::f64: narrow<double>(rows, columns, [](Real x) { return static_cast<double>(x); }, out); break;
    case Dtype::bf16:
      narrow<std::uint16_t>(rows, columns, [](Real x) { return bf16_nearest(static_cast<float>(x)); }, out);
      break;
    case Dtype::f16:
      narrow<std::uint16_t>(rows, columns, [](Real x) { return f16_nearest(static_cast<float>(x)); }, out);
      break;
    default: narrow<float>(rows, columns, [](Real x) { return static_cast<float>(x); }, out);
  }
}

template <class T>
Matrix<T> typed(const AnyMatrix& m) {
  return {static_cast<T*>(m.data), m.rows, m.cols, m.stride};
}

template <class Row, class Factor>
std::unique_ptr<ExactCore> make(const AnyMatrix& weight, const AnyMatrix& velocity, const ExactOptions& options) {
  if (options.method == ExactMethod::woodbury)
    return std::make_unique<WoodburyExact<Row, Factor>>(typed<Row>(weight), options);
  return std::make_unique<BlockedExact<Row, Factor>>(typed<Row>(weight), typed<Row>(velocity), options);
}

}  // namespace

void load_rows(const ConstAnyMatrix& from, Dense<double>& out) { read_any(from, out); }
void load_rows(const ConstAnyMatrix& from, Dense<float>& out) { read_any(from, out); }
void store_rows(const Dense<double>& rows, i64 columns, const AnyMatrix& out) { store(rows, columns, out); }
void store_rows(const Dense<float>& rows, i64 columns, const AnyMatrix& out) { store(rows, columns, out); }

std::unique_ptr<ExactCore> make_exact(AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options) {
  if (weight.dtype == Dtype::f64) return make<double, double>(weight, velocity, options);
  return options.wide ? make<float, double>(weight, velocity, options) : make<float, float>(weight, velocity, options);
}

}  // namespace widehead::cpu
