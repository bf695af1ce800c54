// exact_log.h -- the block matrices since a row was last written, as a log-structured merge
//
// A row with label e is to be multiplied by the matrices of the blocks e, e + 1, ... Level 0 holds the newest blocks, an interval
// of a level above is the product of a full level below. Each interval keeps the product from its own start to its level's end, so
// that a row takes one product a level. When a level is full it goes up as one interval; rows whose label lies strictly within it move
// to its end, rows at its start stay: no pass over all rows, ever.
#pragma once
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "cpu/exact_matrix.h"

namespace widehead::cpu {

// A product of block matrices: I + `matrix`, or `matrix` alone. A block of small steps is near I, and what its entries are rounded by,
// all rows suffer alike: W'W, and the losses with it, feel that far more than the rounding of each row by itself. So it is kept as
// the difference to I until the matrix itself is smaller: |U|^2 < |U - I|^2 where its trace is below half of its size.
template <class Factor>
struct BlockMatrix {
  Dense<Factor> matrix;
  bool beside_identity = true;

  void settle() {
    if (!beside_identity) return;
    double trace = 0;
    for (i64 k = 0; k < matrix.rows; ++k) trace += static_cast<double>(matrix.at(k, k));
    if (trace >= -0.5 * static_cast<double>(matrix.rows)) return;
    for (i64 k = 0; k < matrix.rows; ++k) matrix.at(k, k) += Factor{1};
    beside_identity = false;
  }
  // this <- this * next; (a I + A)(b I + B) = a b I + (a B + b A + A B). `scratch` is of their size.
  void append(const BlockMatrix& next, Dense<Factor>& scratch) {
    const auto a = static_cast<Factor>(beside_identity), b = static_cast<Factor>(next.beside_identity);
    for (std::size_t i = 0; i < scratch.data.size(); ++i)
      scratch.data[i] = a * next.matrix.data[i] + b * matrix.data[i];
    product(matrix, false, next.matrix, false, scratch, Factor{1});
    std::swap(matrix.data, scratch.data);
    beside_identity = beside_identity && next.beside_identity;
    settle();
  }
};

template <class Factor>
class BlockLog {
 public:
  struct Place {
    int level = -1;  // -1: nothing to multiply by
    int index = 0;
  };
  struct Interval {
    i64 start;
    BlockMatrix<Factor> suffix;
  };

  BlockLog(i64 width, i64 radix) : width_(width), radix_(radix), levels_(1) {}

  i64 end() const { return end_; }  // the label of rows that are written now
  int levels() const { return static_cast<int>(levels_.size()); }
  const BlockMatrix<Factor>& suffix(int level, int index) const {
    return levels_[static_cast<std::size_t>(level)][static_cast<std::size_t>(index)].suffix;
  }
  bool empty(int level) const { return levels_[static_cast<std::size_t>(level)].empty(); }
  i64 matrices() const {
    i64 n = 0;
    for (const auto& level : levels_) n += static_cast<i64>(level.size());
    return n;
  }
  Place place(i64 label) const {
    const auto found = places_.find(label);
    return found == places_.end() ? Place{} : found->second;
  }

  // Takes the matrix of a block less I, in which so many `rows` were written. move(label, to, suffix) multiplies the rows of a label and gives them the label `to`.
  template <class Move>
  void push(Dense<Factor> block, i64 rows, Move move) {
    const i64 full = radix_for(rows);
    append(0, {end_, {std::move(block)}});
    ++end_;
    for (std::size_t l = 0; levels_[l].size() >= static_cast<std::size_t>(full); ++l) {
      for (std::size_t i = 1; i < levels_[l].size(); ++i) move(levels_[l][i].start, end_, levels_[l][i].suffix);
      Interval whole = std::move(levels_[l].front());
      levels_[l].clear();
      if (l + 1 == levels_.size()) levels_.emplace_back();
      append(l + 1, std::move(whole));
    }
    places_.clear();
    for (std::size_t l = 0; l < levels_.size(); ++l)
      for (std::size_t i = 0; i < levels_[l].size(); ++i)
        places_[levels_[l][i].start] = {static_cast<int>(l), static_cast<int>(i)};
  }

  void clear() {
    levels_.assign(1, {});
    places_.clear();
    end_ = 0;
  }

 private:
  // A block takes about (radix - 1) / 2 products of matrices, a row one product with a matrix for each level that it goes through.
  // With few rows in a block low levels are cheaper. It may change at any time.
  i64 radix_for(i64 rows) const {
    const i64 by = 2 * rows <= width_ ? 4 : rows < width_ ? 2 : 1;
    return std::max<i64>(std::min<i64>(radix_, 2), radix_ / by);
  }
  void append(std::size_t level, Interval interval) {
    interval.suffix.settle();
    Dense<Factor> scratch(width_, width_);
    for (Interval& old : levels_[level]) old.suffix.append(interval.suffix, scratch);
    levels_[level].push_back(std::move(interval));
  }

  i64 width_, radix_, end_ = 0;
  std::vector<std::vector<Interval>> levels_;  // 0 the newest
  std::unordered_map<i64, Place> places_;
};

}  // namespace widehead::cpu
