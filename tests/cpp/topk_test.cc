// topk_test.cc -- the streaming list against a sort: ties, NaN, infinities, k beyond what there is
#include "widehead/topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "widehead/random.h"

namespace {

using Pair = std::pair<double, std::int64_t>;

template <class T>
std::vector<Pair> by_stream(const std::vector<std::pair<T, std::int64_t>>& stream, std::int64_t k) {
  // One place more than k, to see that the list keeps to its own.
  std::vector<T> scores(static_cast<std::size_t>(k) + 1, T(-77));
  std::vector<std::int64_t> classes(static_cast<std::size_t>(k) + 1, -77);
  widehead::TopK<T> list{scores.data(), classes.data(), k};
  for (const auto& [score, c] : stream) {
    const std::int64_t filled = list.filled;
    const bool enters = list.enters(score, c);
    list.push(score, c);
    CHECK(enters == (std::count(classes.begin(), classes.end() - 1, c) == 1));
    CHECK(list.filled == filled || list.filled == filled + 1);
  }
  CHECK(scores.back() == T(-77) && classes.back() == -77);
  std::vector<Pair> result;
  for (std::int64_t i = 0; i < list.filled; ++i) {
    result.emplace_back(scores[static_cast<std::size_t>(i)], classes[static_cast<std::size_t>(i)]);
  }
  return result;
}

template <class T>
std::vector<Pair> by_sort(const std::vector<std::pair<T, std::int64_t>>& stream, std::int64_t k) {
  std::vector<Pair> all;
  for (const auto& [score, c] : stream) {
    if (!std::isnan(score)) all.emplace_back(score, c);
  }
  std::sort(all.begin(), all.end(),
            [](const Pair& a, const Pair& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  all.resize(std::min(all.size(), static_cast<std::size_t>(k)));
  return all;
}

// Scores from a few levels, so that ties are common; classes come in a random order, as tiles of several threads do.
template <class T>
std::vector<std::pair<T, std::int64_t>> stream_of(int n, std::uint64_t levels, std::uint64_t seed) {
  const widehead::RandomStream random{seed};
  std::vector<std::pair<T, std::int64_t>> stream;
  for (int i = 0; i < n; ++i) {
    const std::uint64_t level = random.below(levels, 0, static_cast<std::uint32_t>(i));
    T score = T(level) / T(4) - T(levels) / T(8);
    if (level == 0) score = std::numeric_limits<T>::quiet_NaN();
    if (level == 1) score = -std::numeric_limits<T>::infinity();
    if (level == 2) score = std::numeric_limits<T>::infinity();
    stream.emplace_back(score, i);
  }
  for (int i = n - 1; i > 0; --i) {
    const auto j = random.below(static_cast<std::uint64_t>(i) + 1, 1, static_cast<std::uint32_t>(i));
    std::swap(stream[static_cast<std::size_t>(i)], stream[static_cast<std::size_t>(j)]);
  }
  return stream;
}

template <class T>
void against_sort() {
  std::uint64_t seed = 1;
  for (int n : {0, 1, 2, 5, 37, 300}) {
    for (std::uint64_t levels : {std::uint64_t{3}, std::uint64_t{8}, std::uint64_t{1000000}}) {
      const auto stream = stream_of<T>(n, levels, ++seed);
      for (std::int64_t k : {1, 2, 5, 36, 37, 38, 500}) CHECK(by_stream(stream, k) == by_sort(stream, k));
    }
  }
}

TEST(float_against_sort) { against_sort<float>(); }
TEST(double_against_sort) { against_sort<double>(); }

TEST(ties_go_to_the_lower_class) {
  const std::vector<std::pair<float, std::int64_t>> stream = {{1, 9}, {1, 3}, {1, 7}, {1, 1}, {1, 5}};
  CHECK((by_stream(stream, 3) == std::vector<Pair>{{1, 1}, {1, 3}, {1, 5}}));
}

TEST(only_nan_leaves_it_empty) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(by_stream<float>({{nan, 0}, {-nan, 1}}, 2).empty());
}

TEST(minus_infinity_is_a_score) {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK((by_stream<float>({{-infinity, 4}, {-infinity, 2}}, 3) == std::vector<Pair>{{-infinity, 2}, {-infinity, 4}}));
}

}  // namespace
