// topk.h -- the k best classes of every example, from a stream of tiles; ties go to the lower class
#pragma once
#include <cstdint>

namespace widehead {

// Best-first list of at most k (score, class) pairs over memory of the caller. NaN scores never enter.
template <class T>
struct TopK {
  T* scores;              // [k]
  std::int64_t* classes;  // [k]
  std::int64_t k;
  std::int64_t filled = 0;

  bool enters(T score, std::int64_t c) const {
    if (!(score == score)) return false;
    if (filled < k) return true;
    const T last = scores[k - 1];
    return score > last || (score == last && c < classes[k - 1]);
  }
  void push(T score, std::int64_t c) {
    if (!enters(score, c)) return;
    std::int64_t i = filled < k ? filled++ : k - 1;
    for (; i > 0 && (scores[i - 1] < score || (scores[i - 1] == score && classes[i - 1] > c)); --i) {
      scores[i] = scores[i - 1];
      classes[i] = classes[i - 1];
    }
    scores[i] = score;
    classes[i] = c;
  }
};

}  // namespace widehead
