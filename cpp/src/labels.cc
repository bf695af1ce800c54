// labels.cc -- checks targets before anything is computed from them
#include "widehead/labels.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "widehead/error.h"

namespace widehead {
namespace {

using std::to_string;

[[noreturn]] void refuse(const char* argument, const std::string& what) {
  throw LabelError(std::string(argument) + ": " + what);
}

std::string place(const Labels& labels, std::int64_t row, std::int64_t position) {
  if (labels.indptr == nullptr) return "row " + to_string(row);
  return "row " + to_string(row) + " (position " + to_string(position) + " in the indices)";
}

void check_weight(const Labels& labels, std::int64_t row, std::int64_t position, const char* argument) {
  if (labels.values == nullptr || std::isfinite(labels.values[position])) return;
  refuse(argument, "the weight of label " + to_string(labels.indices[position]) + " at " +
                       place(labels, row, position) + " must be finite, got " + to_string(labels.values[position]));
}

[[noreturn]] void refuse_range(const Labels& labels, std::int64_t row, std::int64_t position, const char* argument,
                               const std::string& also) {
  refuse(argument, "label " + to_string(labels.indices[position]) + " at " + place(labels, row, position) +
                       " is out of range: expected 0 to " + to_string(labels.n_classes - 1) + also);
}

// Sorting a copy of the row finds repeats in memory that depends on the row alone, not on the number of classes.
void check_distinct(const Labels& labels, std::int64_t row, std::vector<std::pair<std::int64_t, std::int64_t>>& sorted,
                    const char* argument) {
  const std::int64_t begin = labels.indptr[row], end = labels.indptr[row + 1];
  bool ascending = true;
  for (std::int64_t j = begin + 1; j < end && ascending; ++j) ascending = labels.indices[j - 1] < labels.indices[j];
  if (ascending) return;
  sorted.clear();
  for (std::int64_t j = begin; j < end; ++j) sorted.emplace_back(labels.indices[j], j);
  std::sort(sorted.begin(), sorted.end());
  std::int64_t earlier = -1, repeat = end;
  for (std::size_t j = 1; j < sorted.size(); ++j) {
    if (sorted[j].first == sorted[j - 1].first && sorted[j].second < repeat) {
      earlier = sorted[j - 1].second;
      repeat = sorted[j].second;
    }
  }
  if (earlier < 0) return;
  refuse(argument, "label " + to_string(labels.indices[repeat]) + " at " + place(labels, row, repeat) +
                       " is already at position " + to_string(earlier) + ": the labels of a row must be distinct");
}

}  // namespace

void check_labels(const Labels& labels, std::int64_t ignore_index, const char* argument) {
  if (labels.rows < 0) refuse(argument, "expected at least 0 rows, got " + to_string(labels.rows));
  if (labels.n_classes < 1) refuse(argument, "expected at least 1 class, got " + to_string(labels.n_classes));
  if (labels.indptr == nullptr) {
    if (labels.rows > 0 && labels.indices == nullptr) refuse(argument, "the labels are missing");
    for (std::int64_t r = 0; r < labels.rows; ++r) {
      const std::int64_t c = labels.indices[r];
      if (c == ignore_index) continue;
      if (c < 0 || c >= labels.n_classes) {
        refuse_range(labels, r, r, argument, ", or the ignore_index " + to_string(ignore_index));
      }
      check_weight(labels, r, r, argument);
    }
    return;
  }
  if (labels.indptr[0] < 0) refuse(argument, "the row pointers must begin at 0, got " + to_string(labels.indptr[0]));
  for (std::int64_t r = 0; r < labels.rows; ++r) {
    if (labels.indptr[r + 1] < labels.indptr[r]) {
      refuse(argument, "the row pointers decrease from " + to_string(labels.indptr[r]) + " to " +
                           to_string(labels.indptr[r + 1]) + " at row " + to_string(r));
    }
  }
  if (labels.nnz() > labels.indptr[0] && labels.indices == nullptr) refuse(argument, "the labels are missing");
  std::vector<std::pair<std::int64_t, std::int64_t>> sorted;
  for (std::int64_t r = 0; r < labels.rows; ++r) {
    for (std::int64_t j = labels.indptr[r]; j < labels.indptr[r + 1]; ++j) {
      if (labels.indices[j] < 0 || labels.indices[j] >= labels.n_classes) refuse_range(labels, r, j, argument, "");
      check_weight(labels, r, j, argument);
    }
    check_distinct(labels, r, sorted, argument);
  }
}

}  // namespace widehead
