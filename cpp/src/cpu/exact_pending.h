// exact_pending.h -- the gradient that the next step of the exact head will take, batch by batch
#pragma once
#include <algorithm>

#include "cpu/exact_gram.h"
#include "widehead/exact.h"

namespace widehead::cpu {

// One batch after another, as one: gradients add up.
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
  void add(const Dense<double>& batch, const std::vector<i64>& batch_indptr, const std::vector<i64>& batch_ids,
           const double* grad_A, const double* grad_q, const double* grad_s, const Dense<double>& x) {
    append(hidden, batch);
    append(by_rows, x);
    const i64 before = static_cast<i64>(ids.size());
    for (std::size_t i = 1; i < batch_indptr.size(); ++i) indptr.push_back(before + batch_indptr[i]);
    ids.insert(ids.end(), batch_ids.begin(), batch_ids.end());
    gA.insert(gA.end(), grad_A, grad_A + batch_ids.size());
    gq.insert(gq.end(), grad_q, grad_q + batch.rows);
    gs.insert(gs.end(), grad_s, grad_s + batch.rows);
  }
  void scale(double c) {
    for (auto* v : {&gA, &gq, &gs})
      for (double& x : *v) x *= c;
    for (double& x : by_rows.data) x *= c;
  }

  // S'1 [m], from W'1 and the number of classes.
  std::vector<double> ones(const std::vector<double>& sums, i64 classes) const {
    std::vector<double> out(gq.size());
    for (i64 i = 0; i < examples(); ++i) {
      double s = 0, y = 0;
      for (i64 k = 0; k < d_; ++k) s += hidden.at(i, k) * sums[static_cast<std::size_t>(k)];
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
  Dense<double> products(const std::vector<double>& ones, OutputRow output_row) const {
    const i64 m = examples();
    Dense<double> out(m, m), scaled(m, d_);
    for (i64 i = 0; i < m; ++i)
      for (i64 k = 0; k < d_; ++k) scaled.at(i, k) = 2 * gq[static_cast<std::size_t>(i)] * hidden.at(i, k);
    Dense<double> by_weight(m, d_);
    for (i64 i = 0; i < m; ++i) std::copy_n(by_rows.row(i), d_, by_weight.row(i));
    product(by_weight, false, scaled, true, out);
    for (i64 i = 0; i < m; ++i)
      for (i64 j = 0; j < m; ++j) out.at(i, j) += ones[static_cast<std::size_t>(i)] * gs[static_cast<std::size_t>(j)];
    // S'Y: for a target of example j, column j gets gA times the row of S at the target.
    for (i64 j = 0; j < m; ++j)
      for (i64 t = indptr[static_cast<std::size_t>(j)]; t < indptr[static_cast<std::size_t>(j) + 1]; ++t) {
        const double g = gA[static_cast<std::size_t>(t)];
        const auto* row = output_row(t);
        for (i64 i = 0; i < m; ++i) out.at(i, j) += g * static_cast<double>(row[i]);
      }
    for (i64 i = 0; i < m; ++i)
      for (i64 j = 0; j < i; ++j) out.at(i, j) = out.at(j, i) = 0.5 * (out.at(i, j) + out.at(j, i));
    return out;
  }

  // Of the gradient G = S'H: |G|^2 = tr(S'S HH'), and the mean squares of its columns, diag(H'S'S H) / classes.
  double norm2(const Dense<double>& products) const {
    const i64 m = examples();
    Dense<double> gram(m, m);
    product(hidden, false, hidden, true, gram);
    double sum = 0;
    for (std::size_t i = 0; i < gram.data.size(); ++i) sum += products.data[i] * gram.data[i];
    return std::max(sum, 0.0);  // rounding where all of it cancels
  }
  void columns(const Dense<double>& products, i64 classes, double* mean_squares) const {
    Dense<double> weighted(examples(), d_);
    product(products, false, hidden, false, weighted);
    for (i64 k = 0; k < d_; ++k) {
      double sum = 0;
      for (i64 i = 0; i < examples(); ++i) sum += weighted.at(i, k) * hidden.at(i, k);
      mean_squares[k] = std::max(sum, 0.0) / static_cast<double>(classes);
    }
  }

  Dense<double> hidden, by_rows;
  std::vector<i64> indptr, ids;
  std::vector<double> gA, gq, gs;

 private:
  static void append(Dense<double>& to, const Dense<double>& rows) {
    to.data.insert(to.data.end(), rows.data.begin(), rows.data.end());
    to.rows += rows.rows;
  }
  i64 d_, width_;
};

}  // namespace widehead::cpu
