// exact_woodbury.h -- the published method: rows W_j = V_j U + omega, of which a step writes those of the targets alone
//
// A step is W <- W P + Y'B + 1 gs'B with P = f I + E'B, where E = 2 diag(gq) H and B = -lr H [m, d]. By Sherman, Morrison and
// Woodbury, with K = f I + E B' [m, m] and T = B U'^-1 = K'^-1 (B U^-1):
//   U'^-T = (U^-T - T'E) / f,   U' = U P,   V_j' = V_j + Y_j'T,   omega' = omega P + gs'B.
// Where U shrinks, what is written to V grows by 1 / sigma_min, and rounding errors with it. So U lives for an epoch only: before
// a step would take U or U^-1 beyond `max_kappa`, U goes to the log of the store, and U = I again; rows follow when they are
// next read. A step that goes beyond it on its own, a singular one too, is a plain step on the rows of its targets.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/exact_core.h"
#include "cpu/exact_inverse.h"
#include "cpu/exact_pending.h"
#include "cpu/exact_store.h"
#include "widehead/error.h"

namespace widehead::cpu {

// U, U^-T and omega are float64 always: they cost d^2, and what they lose all rows lose.
template <class Row, class Factor>
class WoodburyExact final : public ExactCore {
 public:
  WoodburyExact(Matrix<Row> weight, const ExactOptions& options)
      : options_(options),
        store_(weight, {}, options.radix),
        gram_(weight.cols, weight.cols),
        pending_(weight.cols, weight.cols),
        omega_(static_cast<std::size_t>(weight.cols), 0.0) {
    classes = weight.rows;
    features = weight.cols;
    begin_epoch();
    forget();
    sum_rows();
  }

  std::shared_ptr<ExactBatch> forward(const ConstAnyMatrix& hidden, const Labels& target, bool train, double* A,
                                      double* q, double* s) override {
    auto batch = std::make_shared<KeptBatch<double>>();
    load_rows(hidden, batch->hidden);
    batch->set_targets(target);
    batch->steps = version_;
    batch->train = train;
    gram_.statistics(batch->hidden, batch->hidden_squares, q, s);
    batch->unique = batch->ids;
    std::sort(batch->unique.begin(), batch->unique.end());
    batch->unique.erase(std::unique(batch->unique.begin(), batch->unique.end()), batch->unique.end());
    batch->rows = base_rows(batch->unique);
    batch->base = base_;
    const Dense<double> uh = factored(batch->hidden);
    const std::vector<double> shift = shifts(batch->hidden);
    parallel_for(batch->hidden.rows, [&](i64 i) {
      for (i64 t = batch->indptr[static_cast<std::size_t>(i)]; t < batch->indptr[static_cast<std::size_t>(i) + 1];
           ++t) {
        const double* row = batch->rows.row(place(batch->unique, batch->ids[static_cast<std::size_t>(t)]));
        A[t] = dot(row, uh.row(i), features) + shift[static_cast<std::size_t>(i)];
      }
    });
    return batch;
  }

  void backward(const ExactBatch& any_batch, const double* grad_A, const double* grad_q, const double* grad_s,
                AnyMatrix grad_hidden) override {
    const auto& batch = static_cast<const KeptBatch<double>&>(any_batch);
    if (batch.steps != version_) throw Error("backward: the weights have taken a step since this batch's forward pass");
    const Dense<double> moved = batch.base == base_ ? Dense<double>() : base_rows(batch.unique);
    const Dense<double>& rows = batch.base == base_ ? batch.rows : moved;
    Dense<double> x(batch.hidden.rows, features), sparse = Dense<double>::zeros(batch.hidden.rows, features);
    parallel_for(batch.hidden.rows, [&](i64 i) {
      double* out = x.row(i);
      double sum = 0;
      for (i64 t = batch.indptr[static_cast<std::size_t>(i)]; t < batch.indptr[static_cast<std::size_t>(i) + 1]; ++t) {
        const double* row = rows.row(place(batch.unique, batch.ids[static_cast<std::size_t>(t)]));
        add_times(grad_A[t], row, features, sparse.row(i));
        sum += grad_A[t];
      }
      for (i64 k = 0; k < features; ++k)
        out[k] = 2 * grad_q[i] * batch.hidden_squares.at(i, k) + grad_s[i] * gram_.sums()[static_cast<std::size_t>(k)] +
                 sum * omega_[static_cast<std::size_t>(k)];
    });
    product(sparse, false, factor_, false, x, 1.0);
    if (grad_hidden) store_rows(x, features, grad_hidden);
    if (!batch.train) return;
    pending_.add(batch, grad_A, grad_q, grad_s, std::move(x));
    for (std::size_t i = 0; i < batch.unique.size(); ++i) {
      if (!slots_.emplace(batch.unique[i], rows_.rows).second) continue;
      ids_.push_back(batch.unique[i]);
      const double* row = rows.row(static_cast<i64>(i));
      rows_.data.insert(rows_.data.end(), row, row + features);
      ++rows_.rows;
    }
  }

  double grad_norm2() const override { return pending_.norm2(gradient_products(gradients())); }
  void grad_columns(double* mean_squares) const override {
    pending_.columns(gradient_products(gradients()), classes, mean_squares);
  }
  void scale_grad(double factor) override { pending_.scale(factor); }
  void zero_grad() override { forget(); }
  std::int64_t pending() const override { return pending_.examples(); }

  void step(const ExactStep& step) override {
    if (pending_.examples() == 0) return;
    if (step.lr == 0) return forget();
    const Carry j{1 - step.lr * step.weight_decay, 0, 0, 1};
    Dense<double> b(pending_.examples(), features), e(pending_.examples(), features);
    for (i64 i = 0; i < b.rows; ++i)
      for (i64 k = 0; k < features; ++k) {
        const double h = pending_.hidden.at(i, k);
        b.at(i, k) = -step.lr * h * (step.column_scale ? step.column_scale[k] : 1.0);
        e.at(i, k) = 2 * pending_.gq[static_cast<std::size_t>(i)] * h;
      }
    const Dense<double> s = gradients();
    const std::vector<double> ones = pending_.ones(gram_.sums(), classes);
    const Dense<double> products = gradient_products(s, ones);
    if (!factored_step(j.j11, e, b)) {
      close_epoch();
      if (!factored_step(j.j11, e, b)) plain_step(j.j11, e, b, s);
    }
    gram_.step(j, pending_.by_rows, products, ones, b);
    forget();
    ++steps_;
    ++version_;
  }

  void rows(const std::int64_t* ids, std::int64_t n, AnyMatrix out) const override {
    store_rows(read(std::vector<i64>(ids, ids + n)), features, out);
  }

  void consolidate() override {
    close_epoch();
    store_.consolidate([&](i64, Factor* row) {
      for (i64 k = 0; k < features; ++k)
        row[k] = static_cast<Factor>(static_cast<double>(row[k]) + omega_[static_cast<std::size_t>(k)]);
    });
    add_omega(rows_);
    std::fill(omega_.begin(), omega_.end(), 0.0);
    ++base_;
  }
  void refresh() override {
    consolidate();
    sum_rows();
    ++version_;
  }

  ExactDiagnostics diagnostics() const override {
    ExactDiagnostics out{};
    out.steps = steps_;
    out.blocks = blocks_;
    out.matrices = store_.log().matrices();
    out.hot_rows = rows_.rows;
    out.fetched = fetched_;
    out.row_products = store_.row_products();
    out.listed = store_.listed();
    out.plain_steps = plain_steps_;
    out.kappa = kappa_;
    for (i64 k = 0; k < features; ++k) out.weight_norm2 += gram_.squares().at(k, k);
    out.gram_error = gram_.error([&](i64 first, i64 n) { return read(range(first, n)); }, classes);
    return out;
  }

 private:
  static i64 place(const std::vector<i64>& ids, i64 id) {
    return std::lower_bound(ids.begin(), ids.end(), id) - ids.begin();
  }
  static std::vector<i64> range(i64 first, i64 n) {
    std::vector<i64> ids(static_cast<std::size_t>(n));
    for (i64 i = 0; i < n; ++i) ids[static_cast<std::size_t>(i)] = first + i;
    return ids;
  }

  // V_j in the base of this epoch.
  Dense<double> base_rows(const std::vector<i64>& ids) {
    fetched_ += static_cast<i64>(ids.size());
    return std::as_const(*this).stored_rows(ids);
  }
  Dense<double> stored_rows(const std::vector<i64>& ids) const {
    const Dense<Factor> rows = store_.read(ids.data(), static_cast<i64>(ids.size()));
    Dense<double> out(rows.rows, rows.cols);
    std::copy(rows.data.begin(), rows.data.end(), out.data.begin());
    return out;
  }
  // W_j.
  Dense<double> read(const std::vector<i64>& ids) const {
    Dense<double> rows = stored_rows(ids);
    if (in_epoch_ > 0) {
      Dense<double> now(rows.rows, rows.cols);
      product(rows, false, factor_, false, now);
      rows = std::move(now);
    }
    add_omega(rows);
    return rows;
  }
  void add_omega(Dense<double>& rows) const {
    for (i64 r = 0; r < rows.rows; ++r)
      for (i64 k = 0; k < features; ++k) rows.at(r, k) += omega_[static_cast<std::size_t>(k)];
  }

  // U h and omega'h of each example: an output is V_j (U h) + omega'h, without W_j.
  Dense<double> factored(const Dense<double>& hidden) const {
    Dense<double> out(hidden.rows, features);
    product(hidden, false, factor_, true, out);
    return out;
  }
  std::vector<double> shifts(const Dense<double>& hidden) const {
    std::vector<double> out(static_cast<std::size_t>(hidden.rows));
    for (i64 i = 0; i < hidden.rows; ++i)
      out[static_cast<std::size_t>(i)] = dot(omega_.data(), hidden.row(i), features);
    return out;
  }

  // S at the targets' rows, [targets, m].
  Dense<double> gradients() const {
    Dense<double> s(rows_.rows, pending_.examples());
    product(rows_, false, factored(pending_.hidden), true, s);
    const std::vector<double> shift = shifts(pending_.hidden);
    for (i64 r = 0; r < s.rows; ++r)
      for (i64 i = 0; i < s.cols; ++i) {
        const auto at = static_cast<std::size_t>(i);
        s.at(r, i) = 2 * pending_.gq[at] * (s.at(r, i) + shift[at]) + pending_.gs[at];
      }
    each_target([&](i64 slot, i64 i, double g) { s.at(slot, i) += g; });
    return s;
  }
  template <class F>
  void each_target(F f) const {
    for (i64 i = 0; i < pending_.examples(); ++i)
      for (i64 t = pending_.indptr[static_cast<std::size_t>(i)]; t < pending_.indptr[static_cast<std::size_t>(i) + 1];
           ++t)
        f(slots_.at(pending_.ids[static_cast<std::size_t>(t)]), i, pending_.gA[static_cast<std::size_t>(t)]);
  }
  Dense<double> gradient_products(const Dense<double>& s, const std::vector<double>& ones) const {
    return pending_.products(ones, [&](i64 t) { return s.row(slots_.at(pending_.ids[static_cast<std::size_t>(t)])); });
  }
  Dense<double> gradient_products(const Dense<double>& s) const {
    return gradient_products(s, pending_.ones(gram_.sums(), classes));
  }

  // x >= sigma_max, 1 / sigma_min of U: the terms of |U|^2 + |U^-1|^2 - 2d = sum (sigma - 1/sigma)^2 are none of them negative,
  // whatever the signs of gq. With all other sigma = 1 this is the kappa of |U^-1|^2 - (d - 1).
  static double bound(const Dense<double>& u, const Dense<double>& inverse) {
    double sum = -2 * static_cast<double>(u.rows);
    for (const double x : u.data) sum += x * x;
    for (const double x : inverse.data) sum += x * x;
    sum = std::max(sum, 0.0);
    return 0.5 * (std::sqrt(sum) + std::sqrt(sum + 4));
  }

  // False, and nothing has changed, if U would leave its bounds.
  bool factored_step(double keep, const Dense<double>& e, const Dense<double>& b) {
    const i64 m = b.rows, d = features;
    Dense<double> k(m, m);  // K'
    product(b, false, e, true, k);
    for (i64 i = 0; i < m; ++i) k.at(i, i) += keep;
    if (keep == 0 || !invert(k)) return false;
    Dense<double> bu(m, d), t(m, d);
    product(b, false, inverse_, true, bu);
    product(k, false, bu, false, t);
    Dense<double> inverse = inverse_, factor = factor_, ue(d, m);
    product(t, true, e, false, inverse, 1.0, -1.0);
    for (double& x : inverse.data) x /= keep;
    product(factor_, false, e, true, ue);
    product(ue, false, b, false, factor, keep);
    const double reach = bound(factor, inverse);
    if (!(reach <= options_.max_kappa)) return false;
    factor_ = std::move(factor);
    inverse_ = std::move(inverse);
    kappa_ = reach;
    ++in_epoch_;
    move_omega(keep, e, b);
    each_target([&](i64 slot, i64 i, double g) {
      for (i64 c = 0; c < d; ++c) rows_.at(slot, c) += g * t.at(i, c);
    });
    std::vector<Factor> row(static_cast<std::size_t>(d));
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      const double* from = rows_.row(static_cast<i64>(i));
      std::transform(from, from + d, row.begin(), [](double x) { return static_cast<Factor>(x); });
      store_.put(ids_[i], row.data());
    }
    return true;
  }

  // The step on W_j of the targets, U = I before it; all others take P.
  void plain_step(double keep, const Dense<double>& e, const Dense<double>& b, const Dense<double>& s) {
    add_omega(rows_);
    product(s, false, b, false, rows_, keep);
    move_omega(keep, e, b);
    Dense<double> p(features, features);
    product(e, true, b, false, p);
    for (i64 k = 0; k < features; ++k) p.at(k, k) += keep - 1;
    Dense<Factor> out(rows_.rows, features);
    for (i64 r = 0; r < out.rows; ++r)
      for (i64 c = 0; c < features; ++c)
        out.at(r, c) = static_cast<Factor>(rows_.at(r, c) - omega_[static_cast<std::size_t>(c)]);
    for (const i64 id : ids_) store_.take(id);
    store_.close(narrow(p), ids_, out);
    ++blocks_;
    ++plain_steps_;
  }

  void move_omega(double keep, const Dense<double>& e, const Dense<double>& b) {
    std::vector<double> s(static_cast<std::size_t>(b.rows));
    for (i64 i = 0; i < b.rows; ++i)
      s[static_cast<std::size_t>(i)] =
          dot(omega_.data(), e.row(i), features) + pending_.gs[static_cast<std::size_t>(i)];
    for (double& x : omega_) x *= keep;
    for (i64 i = 0; i < b.rows; ++i)
      for (i64 k = 0; k < features; ++k)
        omega_[static_cast<std::size_t>(k)] += s[static_cast<std::size_t>(i)] * b.at(i, k);
  }

  static Dense<Factor> narrow(const Dense<double>& from) {
    Dense<Factor> out(from.rows, from.cols);
    std::transform(from.data.begin(), from.data.end(), out.data.begin(),
                   [](double x) { return static_cast<Factor>(x); });
    return out;
  }

  void begin_epoch() {
    factor_ = inverse_ = Dense<double>::identity(features);
    kappa_ = 1;
    in_epoch_ = 0;
  }
  void close_epoch() {
    if (in_epoch_ == 0) return;
    Dense<double> rows(rows_.rows, features);
    product(rows_, false, factor_, false, rows);
    rows_ = std::move(rows);
    for (i64 k = 0; k < features; ++k) factor_.at(k, k) -= 1;
    store_.close(narrow(factor_), {}, Dense<Factor>());
    ++blocks_;
    ++base_;
    begin_epoch();
  }

  // The gradient so far.
  void forget() {
    pending_.clear();
    rows_.resize(0, features);
    ids_.clear();
    slots_.clear();
  }

  void sum_rows() {
    constexpr i64 kChunk = 1024;
    gram_.reset();
    for (i64 first = 0; first < classes; first += kChunk)
      gram_.add(read(range(first, std::min(kChunk, classes - first))));
    gram_.settle();
  }

  ExactOptions options_;
  RowStore<Row, Factor> store_;
  Gram<double> gram_;
  Pending<double> pending_;
  Dense<double> rows_;  // of the targets of the gradient so far, in the base of this epoch
  std::vector<i64> ids_;
  std::unordered_map<i64, i64> slots_;
  std::vector<double> omega_;
  Dense<double> factor_, inverse_;  // U and U^-T
  double kappa_ = 1;
  i64 in_epoch_ = 0, base_ = 0, version_ = 0, steps_ = 0, blocks_ = 0, plain_steps_ = 0, fetched_ = 0;
};

}  // namespace widehead::cpu
