// topk-inl.h -- streaming selection: a vector compare against each example's k-th best, insertion only where one passes
#pragma once
#include "cpu/dense-tile-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

inline bool contains(const i64* sorted, i64 n, i64 x) {
  i64 lo = 0, hi = n;
  while (lo < hi) {
    const i64 mid = (lo + hi) / 2;
    if (sorted[mid] < x) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo < n && sorted[lo] == x;
}

// Inserts behind equal scores: classes come in ascending order, so the lower class stays first.
template <class Real>
void insert(Real* scores, i64* classes, i64 k, i64& filled, Real score, i64 cls) {
  i64 i = filled < k ? filled++ : k - 1;
  for (; i > 0 && scores[i - 1] < score; --i) {
    scores[i] = scores[i - 1];
    classes[i] = classes[i - 1];
  }
  scores[i] = score;
  classes[i] = cls;
}

template <class M>
void topk_panel(TopKTask& task, const Tile<M>& t, const typename M::Real* z, i64 b0, i64 rows) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const i64 k = task.k;
  Real* scores = static_cast<Real*>(task.scores);
  alignas(64) Real last[kP];
  constexpr Real kNever = static_cast<Real>(__builtin_inf());
  const auto threshold = [&](i64 lane) {
    return task.filled[b0 + lane] < k ? -kNever : scores[(b0 + lane) * k + k - 1];
  };
  for (i64 lane = 0; lane < kP; ++lane) last[lane] = lane < rows ? threshold(lane) : kNever;
  for (i64 c = 0; c < t.count; ++c) {
    for (int v = 0; v < 2; ++v) {
      if (v * kLanes >= rows) break;
      uint32_t hits = greater_mask(load(z + c * kP + v * kLanes), load(last + v * kLanes));
      for (; hits; hits &= hits - 1) {
        const i64 lane = v * kLanes + __builtin_ctz(hits), b = b0 + lane, cls = t.first + c;
        if (task.exclude_indptr && contains(task.exclude_sorted + task.exclude_indptr[b] - task.exclude_indptr[0],
                                            task.exclude_indptr[b + 1] - task.exclude_indptr[b], cls))
          continue;
        insert(scores + b * k, task.classes + b * k, k, task.filled[b], z[c * kP + lane], cls);
        last[lane] = threshold(lane);
      }
    }
  }
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
