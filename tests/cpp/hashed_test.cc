// hashed_test.cc -- the hash index and the hashed head on several threads: the same bits as on one, changes and queries
#include "widehead/hashed.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "widehead/error.h"
#include "widehead/hash_index.h"
#include "widehead/parallel.h"

namespace {

using namespace widehead;
using i64 = std::int64_t;

constexpr i64 kClasses = 3000, kFeatures = 20, kBatch = 50, kCandidates = 30, kDraws = 40;

std::vector<float> normal(i64 n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> out(static_cast<std::size_t>(n));
  for (float& x : out) x = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return out;
}

// A few training steps, whose rows are hashed again; everything that comes out.
struct Run {
  std::vector<float> weight = normal(kClasses * kFeatures, 1), bias = normal(kClasses, 2);
  std::vector<float> grad_hidden = std::vector<float>(kBatch * kFeatures);
  std::vector<i64> ids = std::vector<i64>(kBatch * kCandidates);
  std::vector<double> losses = std::vector<double>(kBatch);
  HashStatistics statistics{};

  void train(HashFamily family, int steps) {
    HashIndex index(kFeatures, true, {.family = family, .tables = 9, .hashes = 3, .window = 4, .seed = 5});
    const Matrix<float> rows = matrix(weight.data(), kClasses, kFeatures);
    index.build(rows, {bias.data(), kClasses});
    std::vector<float> drift(kClasses, 0.0f);
    std::vector<i64> target(kBatch), draws(kDraws), moved;
    const std::vector<double> ones(kBatch, 1.0 / kBatch);
    for (int step = 0; step < steps; ++step) {
      const std::vector<float> hidden = normal(kBatch * kFeatures, 10 + static_cast<unsigned>(step));
      std::mt19937 random(static_cast<unsigned>(step));
      for (i64& t : target) t = random() % kClasses;
      for (i64& d : draws) d = random() % kClasses;
      index.query({.hidden = matrix(hidden.data(), kBatch, kFeatures),
                   .candidates = kCandidates,
                   .probes = 1,
                   .ids = ids.data()});
      const auto batch = hashed_forward({.hidden = matrix(hidden.data(), kBatch, kFeatures),
                                         .weight = rows,
                                         .bias = {bias.data(), kClasses},
                                         .target = {.indices = target.data(), .rows = kBatch, .n_classes = kClasses},
                                         .candidates = ids.data(),
                                         .n_candidates = kCandidates,
                                         .negatives = draws.data(),
                                         .n_negatives = kDraws,
                                         .losses = losses.data()});
      moved.resize(static_cast<std::size_t>(batch->rows()));
      Drift far{.sums = drift.data(), .limit = 0.01, .moved = moved.data()};
      const Update update{.optimizer = Optimizer::sgd, .lr = 0.5, .step = static_cast<std::uint64_t>(step) + 1};
      hashed_backward({.batch = batch.get(),
                       .grad_losses = ones.data(),
                       .weight = rows,
                       .bias = {bias.data(), kClasses},
                       .grad_hidden = matrix(grad_hidden.data(), kBatch, kFeatures),
                       .update = &update,
                       .drift = &far});
      index.update(moved.data(), far.n_moved, rows, {bias.data(), kClasses});
      for (i64 i = 0; i < far.n_moved; ++i) drift[static_cast<std::size_t>(moved[static_cast<std::size_t>(i)])] = 0;
    }
    statistics = index.statistics();
  }
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

TEST(the_same_bits_on_any_number_of_threads) {
  const int before = get_num_threads();
  for (const HashFamily family : {HashFamily::wta, HashFamily::dwta, HashFamily::simhash}) {
    Run one, many;
    set_num_threads(1);
    one.train(family, 12);
    set_num_threads(4);
    many.train(family, 12);
    CHECK(same(one.weight, many.weight));
    CHECK(same(one.bias, many.bias));
    CHECK(same(one.grad_hidden, many.grad_hidden));
    CHECK(same(one.ids, many.ids));
    CHECK(same(one.losses, many.losses));
    CHECK(one.statistics.rows == kClasses && one.statistics.spilled == many.statistics.spilled);
    for (const double loss : one.losses) CHECK(std::isfinite(loss) && loss > 0);
  }
  set_num_threads(before);
}

TEST(a_row_finds_itself) {
  const std::vector<float> weight = normal(kClasses * kFeatures, 3);
  HashIndex index(kFeatures, false, {.tables = 9, .hashes = 3, .window = 4, .seed = 7});
  index.build(matrix(weight.data(), kClasses, kFeatures), {});
  std::vector<i64> ids(kClasses);
  std::vector<std::int32_t> counts(kClasses);
  index.query({.hidden = matrix(weight.data(), kClasses, kFeatures),
               .candidates = 1,
               .ids = ids.data(),
               .counts = counts.data()});
  for (i64 i = 0; i < kClasses; ++i) {
    CHECK(ids[static_cast<std::size_t>(i)] == i);
    CHECK(counts[static_cast<std::size_t>(i)] == 9);
  }
}

TEST(refusals) {
  HashIndex index(kFeatures, false, {});
  std::vector<float> weight = normal(10 * kFeatures, 4);
  index.build(matrix(weight.data(), 10, kFeatures), {});
  const i64 beyond = 10;
  CHECK_THROWS(LabelError, index.update(&beyond, 1, matrix(weight.data(), 10, kFeatures), {}), "got 10");
  CHECK_THROWS(ShapeError, index.build(matrix(weight.data(), 10, kFeatures - 1), {}), "weight");
  CHECK_THROWS(ShapeError, HashIndex(kFeatures, false, HashOptions{.tables = 0}), "tables");
}
