// exact.cc -- the exact head's state by the types of its rows and of its factors
#include "cpu/exact_blocked.h"
#include "cpu/exact_woodbury.h"
#include "widehead/random.h"

namespace widehead::cpu {
namespace {

double element_at(const ConstAnyMatrix& m, i64 at) {
  switch (m.dtype) {
    case Dtype::f64: return static_cast<const double*>(m.data)[at];
    case Dtype::bf16: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(m.data)[at]));
    case Dtype::f16: return static_cast<double>(f16_float(static_cast<const std::uint16_t*>(m.data)[at]));
    default: return static_cast<double>(static_cast<const float*>(m.data)[at]);
  }
}

template <class Real>
void store(const Dense<Real>& rows, i64 columns, const AnyMatrix& out) {
  for (i64 r = 0; r < rows.rows; ++r)
    for (i64 k = 0; k < columns; ++k) {
      const i64 at = r * out.stride + k;
      const Real x = rows.at(r, k);
      switch (out.dtype) {
        case Dtype::f64: static_cast<double*>(out.data)[at] = static_cast<double>(x); break;
        case Dtype::bf16: static_cast<std::uint16_t*>(out.data)[at] = bf16_nearest(static_cast<float>(x)); break;
        case Dtype::f16: static_cast<std::uint16_t*>(out.data)[at] = f16_nearest(static_cast<float>(x)); break;
        default: static_cast<float*>(out.data)[at] = static_cast<float>(x);
      }
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

Dense<double> as_double(const ConstAnyMatrix& from) {
  Dense<double> out(from.rows, from.cols);
  for (i64 r = 0; r < from.rows; ++r)
    for (i64 k = 0; k < from.cols; ++k) out.at(r, k) = element_at(from, r * from.stride + k);
  return out;
}

void store_rows(const Dense<double>& rows, i64 columns, const AnyMatrix& out) { store(rows, columns, out); }
void store_rows(const Dense<float>& rows, i64 columns, const AnyMatrix& out) { store(rows, columns, out); }

std::unique_ptr<ExactCore> make_exact(AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options) {
  if (weight.dtype == Dtype::f64) return make<double, double>(weight, velocity, options);
  return options.wide ? make<float, double>(weight, velocity, options) : make<float, float>(weight, velocity, options);
}

}  // namespace widehead::cpu
