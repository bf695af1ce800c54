// exact_pending.h -- the gradient that the next step of the exact head will take, batch by batch
#pragma once
#include <algorithm>

#include "cpu/exact_core.h"
#include "cpu/exact_gram.h"

namespace widehead::cpu {

// One batch after another, as one: gradients add up.
template <class Real>
class Pending {
 public:
  explicit Pending(i64 features, i64 width) : d_(features), width_(width) { clear(); }

  i64 examples() const { return static_cast<i64>(gq.size()); }
  void clear() {
    hidden.resize(0, d_);
    by_rows.resize(0, width_);
    indptr.assign(1, 0);
    ids.clear();
    gA.clear();
    gq.clear();
    gs.clear();
  }
  // x [m, width] = S'R of the batch.
  void add(const KeptBatch<Real>& batch, const double* grad_A, const double* grad_q, const double* grad_s,
           Dense<Real> x) {
    append(hidden, batch.hidden);
    if (examples() == 0) {
      std::swap(by_rows, x);
    } else {
      append(by_rows, x);
    }
    const i64 before = static_cast<i64>(ids.size());
    for (std::size_t i = 1; i < batch.indptr.size(); ++i) indptr.push_back(before + batch.indptr[i]);
    ids.insert(ids.end(), batch.ids.begin(), batch.ids.end());
    gA.insert(gA.end(), grad_A, grad_A + batch.ids.size());
    gq.insert(gq.end(), grad_q, grad_q + batch.examples());
    gs.insert(gs.end(), grad_s, grad_s + batch.examples());
  }
  void scale(double c) {
    for (auto* v : {&gA, &gq, &gs})
      for (double& x : *v) x *= c;
    for (Real& x : by_rows.data) x *= static_cast<Real>(c);
  }

  // S'1 [m], from W'1 and the number of classes.
  std::vector<double> ones(const std::vector<double>& sums, i64 classes) const {
    std::vector<double> out(gq.size());
    for (i64 i = 0; i < examples(); ++i) {
      const double s = dot(sums.data(), hidden.row(i), d_);
      double y = 0;
      for (i64 t = indptr[static_cast<std::size_t>(i)]; t < indptr[static_cast<std::size_t>(i) + 1]; ++t)
        y += gA[static_cast<std::size_t>(t)];
      out[static_cast<std::size_t>(i)] =
          2 * gq[static_cast<std::size_t>(i)] * s + static_cast<double>(classes) * gs[static_cast<std::size_t>(i)] + y;
    }
    return out;
  }

  // S'S [m, m]: (S'W) (2 H gq) + (S'1) gs' + S'Y, where S'Y sums the target's entries of S over the sparse part.
  // outputs [nnz, m]: the row of each target times every example.
  template <class OutputRow>
  Dense<Real> products(const std::vector<double>& ones, OutputRow output_row) const {
    const i64 m = examples();
    Dense<Real> out(m, m);
    Product<Real> p = product_of(hidden, false, by_rows, true, out);
    p.b_stride = width_;
    p.k = d_;
    multiply(p);
    // Row j of the transposed: from S'Y, gA times the row of S at each target of example j.
    for (i64 j = 0; j < m; ++j) {
      Real* row = out.row(j);
      const auto q = static_cast<Real>(2 * gq[static_cast<std::size_t>(j)]);
      for (i64 i = 0; i < m; ++i) row[i] *= q;
      add_times(gs[static_cast<std::size_t>(j)], ones.data(), m, row);
      for (i64 t = indptr[static_cast<std::size_t>(j)]; t < indptr[static_cast<std::size_t>(j) + 1]; ++t)
        add_times(gA[static_cast<std::size_t>(t)], output_row(t), m, row);
    }
    for (i64 i = 0; i < m; ++i)
      for (i64 j = 0; j < i; ++j) out.at(i, j) = out.at(j, i) = Real{0.5} * (out.at(i, j) + out.at(j, i));
    return out;
  }

  // Of the gradient G = S'H: |G|^2 = tr(S'S HH'), and the mean squares of its columns, diag(H'S'S H) / classes.
  double norm2(const Dense<Real>& products) const {
    const i64 m = examples();
    Dense<Real> gram(m, m);
    product(hidden, false, hidden, true, gram);
    return std::max(dot(products.data.data(), gram.data.data(), m * m), 0.0);  // rounding where all of it cancels
  }
  void columns(const Dense<Real>& products, i64 classes, double* mean_squares) const {
    Dense<Real> weighted(examples(), d_);
    product(products, false, hidden, false, weighted);
    for (i64 k = 0; k < d_; ++k) {
      double sum = 0;
      for (i64 i = 0; i < examples(); ++i)
        sum += static_cast<double>(weighted.at(i, k)) * static_cast<double>(hidden.at(i, k));
      mean_squares[k] = std::max(sum, 0.0) / static_cast<double>(classes);
    }
  }

  Dense<Real> hidden, by_rows;
  std::vector<i64> indptr, ids;
  std::vector<double> gA, gq, gs;

 private:
  static void append(Dense<Real>& to, const Dense<Real>& rows) {
    to.data.insert(to.data.end(), rows.data.begin(), rows.data.end());
    to.rows += rows.rows;
  }
  i64 d_, width_;
};

}  // namespace widehead::cpu
