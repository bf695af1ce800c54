// exact_inverse.h -- the inverse of a small matrix, by elimination with row pivots
#pragma once
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/exact_matrix.h"

namespace widehead::cpu {

// a <- a^-1 in float64, by Gauss and Jordan in place. False where no pivot is left; `a` is then of no use. Nothing is assumed of the
// matrix: it need be neither symmetric nor definite.
inline bool invert(Dense<double>& a) {
  const i64 n = a.rows;
  std::vector<i64> swapped(static_cast<std::size_t>(n));
  for (i64 c = 0; c < n; ++c) {
    i64 pivot = c;
    for (i64 r = c + 1; r < n; ++r)
      if (std::fabs(a.at(r, c)) > std::fabs(a.at(pivot, c))) pivot = r;
    swapped[static_cast<std::size_t>(c)] = pivot;
    if (!(std::fabs(a.at(pivot, c)) > 0) || !std::isfinite(a.at(pivot, c))) return false;
    if (pivot != c) std::swap_ranges(a.row(c), a.row(c) + n, a.row(pivot));
    double* own = a.row(c);
    const double scale = 1 / own[c];
    own[c] = 1;
    for (i64 k = 0; k < n; ++k) own[k] *= scale;
    for (i64 r = 0; r < n; ++r) {
      double* row = a.row(r);
      const double factor = row[c];
      if (r == c || factor == 0) continue;
      row[c] = 0;
      for (i64 k = 0; k < n; ++k) row[k] -= factor * own[k];
    }
  }
  for (i64 c = n - 1; c >= 0; --c)
    if (const i64 other = swapped[static_cast<std::size_t>(c)]; other != c)
      for (i64 r = 0; r < n; ++r) std::swap(a.at(r, c), a.at(r, other));
  return true;
}

}  // namespace widehead::cpu
