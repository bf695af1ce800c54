// exact_gram.h -- R'R and R'1 of all rows R = [W | V], which a step changes without walking them
//
// A step is R <- R J + S B with J = [[j11, j12], [j21, j22]] (x) identity, S = 2 W H'diag(gq) + 1 gs' + Y the derivative of the loss
// by the outputs [D, m] (H [m, d] the batch), Y its sparse part, and B [m, width]: -lr H, or [-lr H | H] with momentum.
#pragma once
#include <algorithm>
#include <cmath>

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
  void add(const Dense<double>& rows) {
    product(rows, true, rows, false, squares_, 1.0);
    for (i64 r = 0; r < rows.rows; ++r)
      for (i64 k = 0; k < rows.cols; ++k) sums_[static_cast<std::size_t>(k)] += rows.at(r, k);
  }

  // H [m, d] times the first d rows of R'R, [m, width]; q and s of the batch.
  void statistics(const Dense<double>& hidden, Dense<double>& hidden_squares, double* q, double* s) const {
    hidden_squares.resize(hidden.rows, squares_.cols);
    Product<double> p{};
    p.m = hidden.rows;
    p.n = squares_.cols;
    p.k = d_;
    p.a = hidden.data.data();
    p.a_stride = d_;
    p.b = squares_.data.data();
    p.b_stride = p.c_stride = squares_.cols;
    p.c = hidden_squares.data.data();
    multiply(p);
    for (i64 i = 0; i < hidden.rows; ++i) {
      double squares = 0, sum = 0;
      for (i64 k = 0; k < d_; ++k) {
        squares += hidden_squares.at(i, k) * hidden.at(i, k);
        sum += hidden.at(i, k) * sums_[static_cast<std::size_t>(k)];
      }
      q[i] = squares;
      s[i] = sum;
    }
  }

  // x [m, width] = S'R, its rows carried already; m_ = S'S; ones = S'1.
  void step(const Carry& j, Dense<double>& x, const Dense<double>& m, const std::vector<double>& ones,
            const Dense<double>& b) {
    if (squares_.cols > d_ || j.j11 != 1) {
      carry(j, d_, squares_);
      by_tiles([&](i64 r, i64 c) { std::swap(squares_.at(r, c), squares_.at(c, r)); });
      carry(j, d_, squares_);
    }
    carry(j, d_, x);
    product(m, false, b, false, x, 1.0, 0.5);
    product(x, true, b, false, half_);
    by_tiles([&](i64 r, i64 c) {
      squares_.at(r, c) = squares_.at(c, r) = squares_.at(r, c) + (half_.at(r, c) + half_.at(c, r));
    });
    carry_row(j, d_, squares_.cols, sums_.data());
    for (i64 i = 0; i < b.rows; ++i)
      for (i64 k = 0; k < b.cols; ++k)
        sums_[static_cast<std::size_t>(k)] += ones[static_cast<std::size_t>(i)] * b.at(i, k);
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
  Dense<double> squares_, half_;
  std::vector<double> sums_;
};

}  // namespace widehead::cpu
