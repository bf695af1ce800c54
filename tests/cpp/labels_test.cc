// labels_test.cc -- what is wrong with a target, and where, in the message
#include "widehead/labels.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "widehead/error.h"

namespace {

using widehead::check_labels;
using widehead::LabelError;
using widehead::Labels;
using Ints = std::vector<std::int64_t>;

constexpr std::int64_t kIgnore = -100;

void single(const Ints& classes, std::int64_t n_classes, const std::vector<float>& weights = {}) {
  check_labels({.indices = classes.data(),
                .values = weights.empty() ? nullptr : weights.data(),
                .rows = static_cast<std::int64_t>(classes.size()),
                .n_classes = n_classes},
               kIgnore, "target");
}

void multi(const Ints& indptr, const Ints& indices, std::int64_t n_classes, const std::vector<float>& weights = {}) {
  check_labels({.indptr = indptr.data(),
                .indices = indices.data(),
                .values = weights.empty() ? nullptr : weights.data(),
                .rows = static_cast<std::int64_t>(indptr.size()) - 1,
                .n_classes = n_classes},
               kIgnore, "target");
}

TEST(good_labels_pass) {
  single({0, 4, 2, 4}, 5);
  single({}, 5);
  single({kIgnore, kIgnore}, 1);
  single({std::int64_t{100000000} - 1}, 100000000, {0.5f});
  multi({0, 0, 2, 2, 5}, {4, 1, 0, 3, 2}, 5);
  multi({0}, {}, 1);
  multi({0, 0}, {}, 1);
  multi({0, 1, 2}, {3, 3}, 5, {-1.0f, 0.0f});  // the same class in two rows; any finite weight
  multi({2, 3}, {99, 99, 1}, 5);               // a slice of a longer matrix: what is before it is not looked at
}

TEST(single_out_of_range) {
  CHECK_THROWS(LabelError, single({0, 1, 5, 7}, 5), "target: label 5 at row 2 is out of range: expected 0 to 4");
  CHECK_THROWS(LabelError, single({-1}, 5), "label -1 at row 0");
  CHECK_THROWS(LabelError, single({0, -1}, 5), "ignore_index -100");
  CHECK_THROWS(LabelError, single({std::numeric_limits<std::int64_t>::min()}, 5), "label -9223372036854775808");
  CHECK_THROWS(LabelError, single({std::int64_t{1} << 32}, 5), "label 4294967296 at row 0");
}

TEST(multi_out_of_range) {
  CHECK_THROWS(LabelError, multi({0, 1, 3}, {0, 4, 5}, 5),
               "target: label 5 at row 1 (position 2 in the indices) is out of range: expected 0 to 4");
  // ignore_index has no meaning here.
  CHECK_THROWS(LabelError, multi({0, 1}, {kIgnore}, 5), "label -100 at row 0");
  // The first bad label in order is the one named, though a later row has a repeat.
  CHECK_THROWS(LabelError, multi({0, 1, 3}, {9, 2, 2}, 5), "label 9 at row 0");
}

TEST(row_pointers) {
  CHECK_THROWS(LabelError, multi({0, 2, 1}, {0, 1}, 5), "decrease from 2 to 1 at row 1");
  CHECK_THROWS(LabelError, multi({-1, 1}, {0}, 5), "must begin at 0, got -1");
}

TEST(repeats) {
  CHECK_THROWS(LabelError, multi({0, 2, 4}, {0, 1, 3, 3}, 5),
               "label 3 at row 1 (position 3 in the indices) is already at position 2");
  // Unsorted, two classes repeated: the earliest repeat is named.
  CHECK_THROWS(LabelError, multi({0, 6}, {4, 2, 0, 4, 2, 4}, 5),
               "label 4 at row 0 (position 3 in the indices) is already at position 0");
  // A class count that no table could have.
  CHECK_THROWS(LabelError, multi({0, 3}, {std::int64_t{1} << 60, 5, std::int64_t{1} << 60}, std::int64_t{1} << 61),
               "already at position 0");
  // Long rows: every class once passes in any order, one repeat at the end is found.
  Ints row;
  for (std::int64_t i = 0; i < 1000; ++i) row.push_back(i * 389 % 1000);
  multi({0, 1000}, row, 1000);
  row.push_back(row[123]);
  CHECK_THROWS(LabelError, multi({0, 1001}, row, 1000), "position 1000 in the indices) is already at position 123");
}

TEST(weights) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  CHECK_THROWS(LabelError, multi({0, 1, 3}, {0, 1, 2}, 5, {1, 1, nan}),
               "the weight of label 2 at row 1 (position 2 in the indices) must be finite");
  CHECK_THROWS(LabelError, multi({0, 1}, {0}, 5, {-infinity}), "got -inf");
  CHECK_THROWS(LabelError, single({0, 3}, 5, {1, infinity}), "the weight of label 3 at row 1 must be finite");
}

TEST(nothing_to_check_against) {
  CHECK_THROWS(LabelError, single({}, 0), "at least 1 class, got 0");
  const Labels missing{.rows = 2, .n_classes = 5};
  CHECK_THROWS(LabelError, check_labels(missing, kIgnore, "target"), "the labels are missing");
  const Labels negative{.rows = -1, .n_classes = 5};
  CHECK_THROWS(LabelError, check_labels(negative, kIgnore, "labels"), "labels: expected at least 0 rows, got -1");
}

}  // namespace
