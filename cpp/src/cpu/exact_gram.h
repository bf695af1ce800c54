// exact_gram.h -- R'R and R'1 of all rows R = [W | V], which a step changes without walking them
//
// A step is R <- R J + S B with J = [[j11, j12], [j21, j22]] (x) identity, S = 2 W H'diag(gq) + 1 gs' + Y the derivative of the loss
// by the outputs [D, m] (H [m, d] the batch), Y its sparse part, and B [m, width]: -lr H, or [-lr H | H] with momentum.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/exact_matrix.h"

namespace widehead::cpu {

// J of a step, and B by the columns of H that it takes.
struct Carry {
  double j11 = 1, j12 = 0, j21 = 0, j22 = 1;
};

// row <- row J, in place, by J - I: in float32, 1 - lr decay itself would be wrong by as much every step, and that adds up.
template <class Real>
void carry_row(const Carry& j, i64 d, i64 width, Real* row) {
  if (width == d) {
    if (j.j11 != 1)
      for (i64 k = 0; k < d; ++k) row[k] += static_cast<Real>(j.j11 - 1) * row[k];
    return;
  }
  for (i64 k = 0; k < d; ++k) {
    const Real w = row[k], v = row[d + k];
    row[k] = w + (static_cast<Real>(j.j11 - 1) * w + static_cast<Real>(j.j21) * v);
    row[d + k] = static_cast<Real>(j.j12) * w + static_cast<Real>(j.j22) * v;
  }
}

template <class Real>
void carry(const Carry& j, i64 d, Dense<Real>& rows) {
  if (rows.cols == d && j.j11 == 1) return;
  for (i64 r = 0; r < rows.rows; ++r) carry_row(j, d, rows.cols, rows.row(r));
}

// square += J - I
template <class Real>
void carry_from_identity(const Carry& j, i64 d, Dense<Real>& square) {
  for (i64 k = 0; k < d; ++k) {
    square.at(k, k) += static_cast<Real>(j.j11 - 1);
    if (square.cols == d) continue;
    square.at(k, d + k) += static_cast<Real>(j.j12);
    square.at(d + k, k) += static_cast<Real>(j.j21);
    square.at(d + k, d + k) += static_cast<Real>(j.j22 - 1);
  }
}

// R'R and R'1 are kept in float64 and take what a step adds, which is computed in Real: it is small beside them, and what it is
// off by fades with the steps that follow, as all of R'R does.
template <class Real>
class Gram {
 public:
  Gram(i64 features, i64 width)
      : d_(features), squares_(width, width), half_(width, width), sums_(static_cast<std::size_t>(width)) {}

  const Dense<double>& squares() const { return squares_; }
  const std::vector<double>& sums() const { return sums_; }

  void reset() {
    std::fill(squares_.data.begin(), squares_.data.end(), 0.0);
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }
  // After the last add(): settle().
  void add(const Dense<double>& rows) {
    Product<double> p = product_of(rows, true, rows, false, squares_);
    p.beta = 1;
    p.lower = true;
    multiply(p);
    for (i64 r = 0; r < rows.rows; ++r)
      for (i64 k = 0; k < rows.cols; ++k) sums_[static_cast<std::size_t>(k)] += rows.at(r, k);
  }
  void settle() {
    by_tiles([&](i64 r, i64 c) { squares_.at(c, r) = squares_.at(r, c); });
    round();
  }

  // H [m, d] times the first d rows of R'R, [m, width]; q and s of the batch.
  void statistics(const Dense<Real>& hidden, Dense<Real>& hidden_squares, double* q, double* s) const {
    hidden_squares.resize(hidden.rows, squares_.cols);
    Product<Real> p = product_of(hidden, false, rounded(), false, hidden_squares);
    p.k = d_;
    multiply(p);
    for (i64 i = 0; i < hidden.rows; ++i) {
      q[i] = dot(hidden_squares.row(i), hidden.row(i), d_);
      s[i] = dot(sums_.data(), hidden.row(i), d_);
    }
  }

  // x [m, width] = S'R, its rows carried already; m_ = S'S; ones = S'1.
  void step(const Carry& j, Dense<Real>& x, const Dense<Real>& m, const std::vector<double>& ones,
            const Dense<Real>& b) {
    if (squares_.cols > d_ || j.j11 != 1) {
      carry(j, d_, squares_);
      by_tiles([&](i64 r, i64 c) { std::swap(squares_.at(r, c), squares_.at(c, r)); });
      carry(j, d_, squares_);
    }
    carry(j, d_, x);
    product(m, false, b, false, x, Real{1}, Real{0.5});
    product(x, true, b, false, half_);
    by_tiles([&](i64 r, i64 c) {
      squares_.at(r, c) = squares_.at(c, r) =
          squares_.at(r, c) + (static_cast<double>(half_.at(r, c)) + static_cast<double>(half_.at(c, r)));
    });
    round();
    carry_row(j, d_, squares_.cols, sums_.data());
    for (i64 i = 0; i < b.rows; ++i) add_times(ones[static_cast<std::size_t>(i)], b.row(i), b.cols, sums_.data());
  }

  // |Q p - W'(W p)| over |Q p| for p of alternating signs that fade; read(first, n) gives rows of R.
  template <class Read>
  double error(Read read, i64 classes) const {
    constexpr i64 kChunk = 1024;
    std::vector<double> probe(static_cast<std::size_t>(d_)), sum(static_cast<std::size_t>(d_), 0.0);
    for (i64 k = 0; k < d_; ++k)
      probe[static_cast<std::size_t>(k)] = (k % 2 ? -1.0 : 1.0) / static_cast<double>(1 + k % 7);
    for (i64 first = 0; first < classes; first += kChunk) {
      const auto rows = read(first, std::min(kChunk, classes - first));
      for (i64 r = 0; r < rows.rows; ++r) {
        double dot = 0;
        for (i64 k = 0; k < d_; ++k) dot += static_cast<double>(rows.at(r, k)) * probe[static_cast<std::size_t>(k)];
        for (i64 k = 0; k < d_; ++k) sum[static_cast<std::size_t>(k)] += dot * static_cast<double>(rows.at(r, k));
      }
    }
    double off = 0, whole = 0;
    for (i64 r = 0; r < d_; ++r) {
      double dot = 0;
      for (i64 k = 0; k < d_; ++k) dot += squares_.at(r, k) * probe[static_cast<std::size_t>(k)];
      whole += dot * dot;
      off += (dot - sum[static_cast<std::size_t>(r)]) * (dot - sum[static_cast<std::size_t>(r)]);
    }
    return whole > 0 ? std::sqrt(off / whole) : std::sqrt(off);
  }

 private:
  // squares_ in Real.
  const Dense<Real>& rounded() const {
    if constexpr (std::is_same_v<Real, double>) {
      return squares_;
    } else {
      return rounded_;
    }
  }
  void round() {
    if constexpr (!std::is_same_v<Real, double>) convert(squares_, rounded_);
  }

  // f(r, c) for c <= r, by tiles: the columns of a matrix lie far apart.
  template <class F>
  void by_tiles(F f) {
    constexpr i64 kTile = 16;
    const i64 n = squares_.rows;
    for (i64 r0 = 0; r0 < n; r0 += kTile)
      for (i64 c0 = 0; c0 <= r0; c0 += kTile)
        for (i64 r = r0; r < std::min(n, r0 + kTile); ++r)
          for (i64 c = c0; c < std::min(c0 + kTile, r + 1); ++c) f(r, c);
  }

  i64 d_;
  Dense<double> squares_;
  Dense<Real> half_, rounded_;
  std::vector<double> sums_;
};

}  // namespace widehead::cpu
