// check.cc -- checks of arguments, shared by all parts
#include "check.h"

#include <cmath>

#include "widehead/error.h"

namespace widehead {
namespace {

using std::int64_t;
using std::string;
using std::to_string;

template <class T>
bool finite_row(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}
bool finite_row_bits(const std::uint16_t* x, int64_t n, std::uint16_t exponent) {
  for (int64_t i = 0; i < n; ++i)
    if ((x[i] & exponent) == exponent) return false;
  return true;
}

void check_state(const char* name, const AnyMatrix& state, bool needed, Dtype dtype, int64_t rows, int64_t cols) {
  if (!needed) return;
  if (!state) throw ShapeError(string("update: ") + name + " is needed by this optimiser and was not given");
  expect_dtype(name, state.dtype, state.dtype == dtype, name_of(dtype));
  expect_shape(name, state, rows, cols);
}

}  // namespace

string shape(const ConstAnyMatrix& m) { return "[" + to_string(m.rows) + ", " + to_string(m.cols) + "]"; }

bool floating(Dtype t) { return t != Dtype::i32 && t != Dtype::i64 && t != Dtype::u16; }

Dtype real_of(Dtype weight) { return weight == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

void expect_dtype(const char* name, Dtype got, bool ok, const char* expected) {
  if (!ok) throw DtypeError(string(name) + ": expected " + expected + ", got " + name_of(got));
}

void expect_size(const char* name, const ConstAnyVector& v, int64_t size, bool required) {
  if (!v) {
    if (required) throw ShapeError(string(name) + ": expected " + to_string(size) + " elements, got none");
    return;
  }
  if (v.size != size)
    throw ShapeError(string(name) + ": expected " + to_string(size) + " elements, got " + to_string(v.size));
}

void expect_shape(const char* name, const ConstAnyMatrix& m, int64_t rows, int64_t cols) {
  if (m.rows != rows || m.cols != cols)
    throw ShapeError(string(name) + ": expected shape [" + to_string(rows) + ", " + to_string(cols) + "], got " +
                     shape(m));
  if (m.rows > 1 && m.stride < m.cols)
    throw ShapeError(string(name) + ": rows overlap: stride " + to_string(m.stride) + " is below " + to_string(m.cols) +
                     " columns");
}

void check_index_type(Dtype dtype, int64_t in_features) {
  expect_dtype("index", dtype, dtype == Dtype::u16 || dtype == Dtype::i32, "uint16 or int32");
  const int64_t most = dtype == Dtype::u16 ? int64_t{1} << 16 : int64_t{1} << 31;
  if (in_features > most)
    throw DtypeError(string("index: ") + name_of(dtype) + " reaches " + to_string(most) + " inputs, there are " +
                     to_string(in_features));
}

void check_option(const char* name, double x, bool ok, const char* expected) {
  if (!ok || !std::isfinite(x)) throw ShapeError(string(name) + ": expected " + expected + ", got " + to_string(x));
}

void check_finite(const ConstAnyMatrix& m, const char* name) {
  for (int64_t r = 0; r < m.rows; ++r) {
    bool ok = true;
    switch (m.dtype) {
      case Dtype::f64: ok = finite_row(static_cast<const double*>(m.data) + r * m.stride, m.cols); break;
      case Dtype::f32: ok = finite_row(static_cast<const float*>(m.data) + r * m.stride, m.cols); break;
      case Dtype::bf16:
        ok = finite_row_bits(static_cast<const std::uint16_t*>(m.data) + r * m.stride, m.cols, 0x7F80);
        break;
      default: ok = finite_row_bits(static_cast<const std::uint16_t*>(m.data) + r * m.stride, m.cols, 0x7C00);
    }
    if (!ok)
      throw NonFiniteError(string(name) + ": expected finite numbers, got NaN or infinity in row " + to_string(r));
  }
}
void check_finite(const ConstAnyVector& v, const char* name) {
  check_finite(ConstAnyMatrix(v.data, v.dtype, v.data ? v.size : 0, 1, 1), name);
}

void check_update(const ConstAnyMatrix& weight, const ConstAnyVector& bias, const Update& u) {
  check_option("lr", u.lr, true, "a finite number");
  check_option("momentum", u.momentum, u.momentum >= 0, "a number >= 0");
  check_option("weight_decay", u.weight_decay, u.weight_decay >= 0, "a number >= 0");
  check_option("beta1", u.beta1, u.beta1 >= 0 && u.beta1 < 1, "a number in [0, 1)");
  check_option("beta2", u.beta2, u.beta2 >= 0 && u.beta2 < 1, "a number in [0, 1)");
  check_option("eps", u.eps, u.eps >= 0, "a number >= 0");
  if (u.step < 1) throw ShapeError("step: expected a count from 1, got 0");
  const Dtype real = real_of(weight.dtype);
  const int64_t rows = weight.rows, cols = weight.cols;
  const bool adam = u.optimizer == Optimizer::adam, adagrad = u.optimizer == Optimizer::adagrad;
  const bool momentum = u.optimizer == Optimizer::sgd && u.momentum > 0;
  if (u.optimizer == Optimizer::sgd && !momentum && u.first)
    throw ShapeError("first: given without momentum; leave it out for plain SGD");
  check_state("first", u.first, adam || momentum, real, rows, cols);
  check_state("second", u.second, adam || adagrad, real, rows, adagrad ? 1 : cols);
  check_state("compensation", u.compensation, size_of(weight.dtype) == 2 && u.rounding == Rounding::kahan, weight.dtype,
              rows, cols);
  if (!bias) return;
  const auto vector = [](const AnyVector& v) { return AnyMatrix(v.data, v.dtype, v.size, 1, 1); };
  check_state("bias_first", vector(u.bias_first), adam || momentum, real, rows, 1);
  check_state("bias_second", vector(u.bias_second), adam || adagrad, real, rows, 1);
}

}  // namespace widehead
