// exact_matrix.h -- small owned matrices of the exact head and their products
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/exact_memory.h"
#include "cpu/matmul.h"
#include "widehead/view.h"

namespace widehead::cpu {

using i64 = std::int64_t;

// [rows, cols], row-major without gaps. Elements are whatever lay there until they are written.
template <class Real>
struct Dense {
  i64 rows = 0, cols = 0;
  std::vector<Real, BlockAllocator<Real>> data;

  Dense() = default;
  Dense(i64 rows_, i64 cols_) { resize(rows_, cols_); }
  void resize(i64 rows_, i64 cols_) {
    rows = rows_;
    cols = cols_;
    data.resize(static_cast<std::size_t>(rows * cols));
  }
  Real* row(i64 r) { return data.data() + r * cols; }
  const Real* row(i64 r) const { return data.data() + r * cols; }
  Real& at(i64 r, i64 c) { return row(r)[c]; }
  Real at(i64 r, i64 c) const { return row(r)[c]; }

  static Dense zeros(i64 rows, i64 cols) {
    Dense out;
    out.rows = rows;
    out.cols = cols;
    out.data.assign(static_cast<std::size_t>(rows * cols), Real{0});
    return out;
  }
  static Dense identity(i64 n) {
    Dense out = zeros(n, n);
    for (i64 i = 0; i < n; ++i) out.at(i, i) = 1;
    return out;
  }
};

// The caller's numbers, and back.
void load_rows(const ConstAnyMatrix& from, Dense<double>& out);
void load_rows(const ConstAnyMatrix& from, Dense<float>& out);
void store_rows(const Dense<double>& rows, i64 columns, const AnyMatrix& out);
void store_rows(const Dense<float>& rows, i64 columns, const AnyMatrix& out);

template <class From, class To>
void convert(const Dense<From>& from, Dense<To>& to) {
  to.resize(from.rows, from.cols);
  const From* in = from.data.data();
  To* out = to.data.data();
  for (i64 i = 0; i < from.rows * from.cols; ++i) out[i] = static_cast<To>(in[i]);
}

// Sums of eight at a time, in float64 and in the same order everywhere.
template <class A, class B>
double dot(const A* a, const B* b, i64 n) {
  double part[8] = {};
  i64 k = 0;
  for (; k + 8 <= n; k += 8)
    for (i64 l = 0; l < 8; ++l) part[l] += static_cast<double>(a[k + l]) * static_cast<double>(b[k + l]);
  for (; k < n; ++k) part[0] += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}
// out += factor x
template <class Real, class Out>
void add_times(double factor, const Real* x, i64 n, Out* out) {
  const auto f = static_cast<Out>(factor);
  for (i64 k = 0; k < n; ++k) out[k] += f * static_cast<Out>(x[k]);
}

template <class Real>
Product<Real> product_of(const Dense<Real>& a, bool a_transposed, const Dense<Real>& b, bool b_transposed,
                         Dense<Real>& c) {
  Product<Real> p{};
  p.m = c.rows;
  p.n = c.cols;
  p.k = b_transposed ? b.cols : b.rows;
  p.a = a.data.data();
  p.a_stride = a.cols;
  p.a_transposed = a_transposed;
  p.b = b.data.data();
  p.b_stride = b.cols;
  p.b_transposed = b_transposed;
  p.c = c.data.data();
  p.c_stride = c.cols;
  return p;
}

// C = alpha op(A) op(B) + beta C
template <class Real>
void product(const Dense<Real>& a, bool a_transposed, const Dense<Real>& b, bool b_transposed, Dense<Real>& c,
             Real beta = 0, Real alpha = 1) {
  Product<Real> p = product_of(a, a_transposed, b, b_transposed, c);
  p.alpha = alpha;
  p.beta = beta;
  multiply(p);
}

}  // namespace widehead::cpu
