// exact_blocked.h -- the inverse-free method: rows of the targets take plain steps for a block, the others only its matrix
//
// Of a row R_c that is no target since the block began, R_c = V_c U + omega holds: U is the product of the block's step matrices. Rows that
// were targets lie apart, `hot`, as they are. When the block ends they go back to the store, and U becomes a matrix of its log.
#pragma once
#include <cmath>

#include "cpu/exact_core.h"
#include "cpu/exact_pending.h"
#include "cpu/exact_store.h"
#include "widehead/error.h"

namespace widehead::cpu {

template <class Row, class Factor>
class BlockedExact final : public ExactCore {
 public:
  BlockedExact(Matrix<Row> weight, Matrix<Row> velocity, const ExactOptions& options)
      : options_(options),
        store_(weight, velocity, options.radix),
        gram_(weight.cols, store_.width()),
        pending_(weight.cols, store_.width()),
        omega_(static_cast<std::size_t>(store_.width()), 0.0) {
    classes = weight.rows;
    features = weight.cols;
    momentum = velocity.data != nullptr;
    hot_.resize(0, width());
    begin_block();
    sum_rows();
  }

  std::shared_ptr<ExactBatch> forward(const ConstAnyMatrix& hidden, const Labels& target, bool train, double* A,
                                      double* q, double* s) override {
    auto batch = std::make_shared<KeptBatch<Factor>>();
    load_rows(hidden, batch->hidden);
    batch->set_targets(target);
    batch->steps = version_;
    batch->base = base_;
    batch->train = train;
    gram_.statistics(batch->hidden, batch->hidden_squares, q, s);
    if (train) {
      warm(batch->ids);
      outputs(*batch, [&](i64 id) { return hot_.row(store_.slot(id)); }, A);
    } else {
      std::vector<i64> ids = distinct(batch->ids);
      batch->rows = read(ids);
      batch->unique = std::move(ids);
      outputs(*batch, [&](i64 id) { return kept_row(*batch, id); }, A);
    }
    return batch;
  }

  void backward(const ExactBatch& any_batch, const double* grad_A, const double* grad_q, const double* grad_s,
                AnyMatrix grad_hidden) override {
    const auto& batch = static_cast<const KeptBatch<Factor>&>(any_batch);
    if (batch.steps != version_) throw Error("backward: the weights have taken a step since this batch's forward pass");
    if (batch.train && batch.base != base_) warm(batch.ids);
    Dense<Factor> x(batch.examples(), width());
    parallel_for(batch.examples(), [&](i64 i) {
      Factor* out = x.row(i);
      const auto q = static_cast<Factor>(2 * grad_q[i]);
      for (i64 k = 0; k < width(); ++k) out[k] = q * batch.hidden_squares.at(i, k);
      if (grad_s[i] != 0) add_times(grad_s[i], gram_.sums().data(), width(), out);
      for (i64 t = batch.indptr[static_cast<std::size_t>(i)]; t < batch.indptr[static_cast<std::size_t>(i) + 1]; ++t) {
        const i64 id = batch.ids[static_cast<std::size_t>(t)];
        add_times(grad_A[t], batch.train ? hot_.row(store_.slot(id)) : kept_row(batch, id), width(), out);
      }
    });
    if (grad_hidden) store_rows(x, features, grad_hidden);
    if (!batch.train) return;
    pending_.add(batch, grad_A, grad_q, grad_s, std::move(x));
  }

  double grad_norm2() const override { return pending_.norm2(gradient_products(hot_gradients())); }
  void grad_columns(double* mean_squares) const override {
    pending_.columns(gradient_products(hot_gradients()), classes, mean_squares);
  }

  void scale_grad(double factor) override { pending_.scale(factor); }
  void zero_grad() override { pending_.clear(); }
  std::int64_t pending() const override { return pending_.examples(); }

  void step(const ExactStep& step) override {
    const i64 m = pending_.examples();
    if (m == 0) return;
    if (step.lr == 0 && !momentum) return pending_.clear();
    const Carry j = carry_of(step);
    const Dense<Factor> b = directions(step), s = hot_gradients();
    const std::vector<double> ones = pending_.ones(gram_.sums(), classes);
    const Dense<Factor> products = gradient_products(s, ones);
    carry(j, features, hot_);
    product(s, false, b, false, hot_, Factor{1});
    move_factor(j, b);
    move_omega(j, b);
    gram_.step(j, pending_.by_rows, products, ones, b);
    pending_.clear();
    ++steps_;
    ++version_;
    if (++in_block_ >= options_.block_steps || crowded(m)) close_block();
  }

  void rows(const std::int64_t* ids, std::int64_t n, AnyMatrix out) const override {
    const Dense<Factor> all = read(std::vector<i64>(ids, ids + n));
    store_rows(all, features, out);
  }

  void consolidate() override {
    close_block();
    store_.consolidate([&](i64, Factor* row) { add_omega(row); });
    std::fill(omega_.begin(), omega_.end(), 0.0);
    ++base_;
    warm(pending_.ids);
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
    out.hot_rows = hot_.rows;
    out.fetched = fetched_;
    out.row_products = store_.row_products();
    out.listed = store_.listed();
    for (i64 k = 0; k < features; ++k) out.weight_norm2 += gram_.squares().at(k, k);
    out.kappa = 1;
    out.gram_error = gram_.error([&](i64 first, i64 n) { return read_range(first, n); }, classes);
    return out;
  }

 private:
  i64 width() const { return store_.width(); }

  static std::vector<i64> distinct(std::vector<i64> ids) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return ids;
  }
  static const Factor* kept_row(const KeptBatch<Factor>& batch, i64 id) {
    return batch.rows.row(std::lower_bound(batch.unique.begin(), batch.unique.end(), id) - batch.unique.begin());
  }
  template <class RowOf>
  void outputs(const KeptBatch<Factor>& batch, RowOf row_of, double* A) const {
    parallel_for(batch.examples(), [&](i64 i) {
      for (i64 t = batch.indptr[static_cast<std::size_t>(i)]; t < batch.indptr[static_cast<std::size_t>(i) + 1]; ++t)
        A[t] = dot(row_of(batch.ids[static_cast<std::size_t>(t)]), batch.hidden.row(i), features);
    });
  }

  void add_omega(Factor* row) const {
    for (i64 k = 0; k < width(); ++k)
      row[k] = static_cast<Factor>(static_cast<double>(row[k]) + omega_[static_cast<std::size_t>(k)]);
  }

  // Rows as they are now.
  Dense<Factor> read(const std::vector<i64>& ids) const {
    std::vector<i64> cold;
    for (i64 id : ids)
      if (store_.slot(id) < 0) cold.push_back(id);
    Dense<Factor> rows = read_cold(cold);
    if (cold.size() == ids.size()) return rows;
    Dense<Factor> out(static_cast<i64>(ids.size()), width());
    i64 next = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const i64 slot = store_.slot(ids[i]);
      std::copy_n(slot < 0 ? rows.row(next++) : hot_.row(slot), width(), out.row(static_cast<i64>(i)));
    }
    return out;
  }
  Dense<Factor> read_cold(const std::vector<i64>& ids) const {
    Dense<Factor> rows = store_.read(ids.data(), static_cast<i64>(ids.size()));
    if (in_block_ > 0) {
      Dense<Factor> now = rows;
      product(rows, false, factor_, false, now, Factor{1});
      rows = std::move(now);
    }
    for (i64 i = 0; i < rows.rows; ++i) add_omega(rows.row(i));
    return rows;
  }

  // Takes rows out of the store; for a second time where they were brought together between a forward pass and its step.
  void warm(const std::vector<i64>& ids) {
    std::vector<i64> cold;
    for (i64 id : ids)
      if (store_.slot(id) < 0) cold.push_back(id);
    if (cold.empty()) return;
    cold = distinct(std::move(cold));
    const Dense<Factor> rows = read_cold(cold);
    hot_.data.insert(hot_.data.end(), rows.data.begin(), rows.data.end());
    hot_.rows += rows.rows;
    for (i64 id : cold) {
      store_.take(id, static_cast<i64>(hot_ids_.size()));
      hot_ids_.push_back(id);
    }
    fetched_ += rows.rows;
  }

  Carry carry_of(const ExactStep& step) const {
    const double keep = 1 - step.lr * step.weight_decay;
    if (!momentum) return {keep, 0, 0, 1};
    return {keep, step.weight_decay, -step.lr * step.momentum, step.momentum};
  }

  // B [m, width].
  Dense<Factor> directions(const ExactStep& step) const {
    Dense<Factor> b(pending_.examples(), width());
    for (i64 i = 0; i < b.rows; ++i) {
      const Factor* h = pending_.hidden.row(i);
      Factor* out = b.row(i);
      for (i64 k = 0; k < features; ++k) {
        const double x = static_cast<double>(h[k]) * (step.column_scale ? step.column_scale[k] : 1.0);
        out[k] = static_cast<Factor>(-step.lr * x);
        if (momentum) out[features + k] = static_cast<Factor>(x);
      }
    }
    return b;
  }

  static std::vector<Factor> doubled(const std::vector<double>& x) {
    std::vector<Factor> out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) out[i] = static_cast<Factor>(2 * x[i]);
    return out;
  }

  // S of the hot rows, [hot, m].
  Dense<Factor> hot_gradients() const {
    Dense<Factor> s(hot_.rows, pending_.examples());
    multiply(product_of(hot_, false, pending_.hidden, true, s));  // weights, not velocities
    const std::vector<Factor> q = doubled(pending_.gq), sums(pending_.gs.begin(), pending_.gs.end());
    for (i64 r = 0; r < s.rows; ++r) {
      Factor* row = s.row(r);
      for (i64 i = 0; i < s.cols; ++i)
        row[i] = q[static_cast<std::size_t>(i)] * row[i] + sums[static_cast<std::size_t>(i)];
    }
    for (i64 i = 0; i < s.cols; ++i)
      for (i64 t = pending_.indptr[static_cast<std::size_t>(i)]; t < pending_.indptr[static_cast<std::size_t>(i) + 1];
           ++t)
        s.at(store_.slot(pending_.ids[static_cast<std::size_t>(t)]), i) +=
            static_cast<Factor>(pending_.gA[static_cast<std::size_t>(t)]);
    return s;
  }

  Dense<Factor> gradient_products(const Dense<Factor>& s, const std::vector<double>& ones) const {
    return pending_.products(ones,
                             [&](i64 t) { return s.row(store_.slot(pending_.ids[static_cast<std::size_t>(t)])); });
  }
  Dense<Factor> gradient_products(const Dense<Factor>& s) const {
    return gradient_products(s, pending_.ones(gram_.sums(), classes));
  }

  // U <- U J + (U's first columns) (2 H gq)' B, of U - I
  void move_factor(const Carry& j, const Dense<Factor>& b) {
    // By examples, [m, width]: H U' of the first columns, U = I + what is kept.
    Dense<Factor> t(b.rows, width());
    for (i64 i = 0; i < t.rows; ++i) {
      std::copy_n(pending_.hidden.row(i), features, t.row(i));
      std::fill(t.row(i) + features, t.row(i) + width(), Factor{0});
    }
    if (in_block_ > 0) {
      Product<Factor> p = product_of(pending_.hidden, false, factor_, true, t);
      p.k = features;
      p.beta = 1;
      multiply(p);
    }
    for (i64 i = 0; i < t.rows; ++i) {
      const auto q = static_cast<Factor>(2 * pending_.gq[static_cast<std::size_t>(i)]);
      Factor* row = t.row(i);
      for (i64 k = 0; k < width(); ++k) row[k] *= q;
    }
    if (in_block_ > 0) {
      carry(j, features, factor_);
      carry_from_identity(j, features, factor_);
    } else {
      std::fill(factor_.data.begin(), factor_.data.end(), Factor{0});
      carry_from_identity(j, features, factor_);
    }
    product(t, true, b, false, factor_, Factor{1});
  }

  // Zero as long as no loss has a derivative by s.
  void move_omega(const Carry& j, const Dense<Factor>& b) {
    const auto none = [](double x) { return x == 0; };
    if (std::all_of(omega_.begin(), omega_.end(), none) && std::all_of(pending_.gs.begin(), pending_.gs.end(), none))
      return;
    std::vector<double> s(static_cast<std::size_t>(b.rows));
    for (std::size_t i = 0; i < s.size(); ++i)
      s[i] =
          2 * pending_.gq[i] * dot(omega_.data(), pending_.hidden.row(static_cast<i64>(i)), features) + pending_.gs[i];
    carry_row(j, features, width(), omega_.data());
    for (i64 i = 0; i < b.rows; ++i) add_times(s[static_cast<std::size_t>(i)], b.row(i), width(), omega_.data());
  }

  // Whether another step of the hot rows would cost more than to end the block, about two products of its matrix.
  bool crowded(i64 examples) const {
    constexpr double kWorth = 1 << 22;
    const double rows = static_cast<double>(hot_.rows) * static_cast<double>(examples);
    const auto side = static_cast<double>(width());
    return rows > side * side && rows * side > kWorth;
  }
  void begin_block() {
    factor_ = Dense<Factor>(width(), width());
    hot_.resize(0, width());
    hot_ids_.clear();
    in_block_ = 0;
  }
  void close_block() {
    for (i64 i = 0; i < hot_.rows; ++i)
      for (i64 k = 0; k < width(); ++k)
        hot_.at(i, k) = static_cast<Factor>(static_cast<double>(hot_.at(i, k)) - omega_[static_cast<std::size_t>(k)]);
    if (in_block_ > 0 || hot_.rows > 0) {
      if (in_block_ == 0) std::fill(factor_.data.begin(), factor_.data.end(), Factor{0});
      store_.close(std::move(factor_), hot_ids_, hot_);
      ++blocks_;
    }
    begin_block();
  }

  Dense<Factor> read_range(i64 first, i64 n) const {
    std::vector<i64> ids(static_cast<std::size_t>(n));
    for (i64 i = 0; i < n; ++i) ids[static_cast<std::size_t>(i)] = first + i;
    return read(ids);
  }
  void sum_rows() {
    constexpr i64 kChunk = 1024;
    gram_.reset();
    for (i64 first = 0; first < classes; first += kChunk) {
      const Dense<Factor> rows = read_range(first, std::min(kChunk, classes - first));
      Dense<double> wide;
      convert(rows, wide);
      gram_.add(wide);
    }
    gram_.settle();
  }

  ExactOptions options_;
  RowStore<Row, Factor> store_;
  Gram<Factor> gram_;
  Pending<Factor> pending_;
  std::vector<double> omega_;  // added to every row that is not hot
  Dense<Factor> factor_;       // U - I, see exact_log.h; not set before the first step of a block
  Dense<Factor> hot_;
  std::vector<i64> hot_ids_;
  i64 in_block_ = 0, base_ = 0, version_ = 0, steps_ = 0, blocks_ = 0, fetched_ = 0;
};

}  // namespace widehead::cpu
