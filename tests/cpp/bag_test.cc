// bag_test.cc -- embedding bag against sums in float64; the same bits for any number of threads
#include "widehead/bag.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "widehead/parallel.h"

namespace {

using namespace widehead;

constexpr std::int64_t kRows = 301, kFeatures = 977, kDim = 21;

// A batch with empty rows, repeated features, and one feature that is in every row that is not empty.
struct Batch {
  std::vector<std::int64_t> indptr{0};
  std::vector<std::int32_t> indices;
  std::vector<float> values, grad;

  Batch() {
    std::uint32_t x = 1;
    const auto next = [&x] { return x = x * 1664525u + 1013904223u, x >> 8; };
    for (std::int64_t b = 0; b < kRows; ++b) {
      const std::uint32_t n = b % 5 == 0 ? 0 : 1 + next() % 90;
      for (std::uint32_t j = 0; j < n; ++j) {
        indices.push_back(j == 0 ? 500 : static_cast<std::int32_t>(next() % kFeatures));
        values.push_back(static_cast<float>(next() % 1000) / 500.0f - 1.0f);
      }
      indptr.push_back(static_cast<std::int64_t>(indices.size()));
    }
    for (std::int64_t i = 0; i < kRows * kDim; ++i) grad.push_back(static_cast<float>(next() % 1000) / 500.0f - 1.0f);
  }
  BagInput input() const {
    return {indptr.data(), {indices.data(), static_cast<std::int64_t>(indices.size())}, values.data(), kRows};
  }
};

std::vector<float> table() {
  std::vector<float> w;
  for (std::int64_t i = 0; i < kFeatures * kDim; ++i) w.push_back(static_cast<float>(std::sin(0.37 * double(i))));
  return w;
}

TEST(forward_and_sgd_step_match_float64) {
  const Batch batch;
  std::vector<float> w = table(), out(kRows * kDim);
  const std::vector<float> before = w;
  bag_forward(
      {.input = batch.input(), .table = matrix(w.data(), kFeatures, kDim), .out = matrix(out.data(), kRows, kDim)});
  std::vector<double> gradient(kFeatures * kDim);
  for (std::int64_t b = 0; b < kRows; ++b)
    for (std::int64_t k = 0; k < kDim; ++k) {
      double sum = 0, size = 0;
      for (std::int64_t e = batch.indptr[b]; e < batch.indptr[b + 1]; ++e) {
        const double term = double{batch.values[e]} * before[batch.indices[e] * kDim + k];
        sum += term;
        size += std::fabs(term);
        gradient[batch.indices[e] * kDim + k] += double{batch.values[e]} * batch.grad[b * kDim + k];
      }
      CHECK_NEAR(out[b * kDim + k], sum, 100 * 0x1p-23 * size);
    }
  const Update update{.optimizer = Optimizer::sgd, .lr = 0.5};
  bag_step({.input = batch.input(),
            .table = matrix(w.data(), kFeatures, kDim),
            .grad = matrix(batch.grad.data(), kRows, kDim),
            .update = &update});
  int moved = 0;
  for (std::int64_t i = 0; i < kFeatures * kDim; ++i) {
    CHECK_NEAR(w[i], before[i] - 0.5 * gradient[i], 1e-4);
    moved += w[i] != before[i];
  }
  CHECK(moved > kFeatures * kDim / 2);
}

TEST(normalised_step_has_the_same_bits_for_any_number_of_threads) {
  const Batch batch;
  const int before = get_num_threads();
  std::vector<float> results[2], state[2];
  for (int i = 0; i < 2; ++i) {
    set_num_threads(i == 0 ? 1 : 4);
    std::vector<float> w = table(), out(kRows * kDim), norms(kRows), second(kFeatures);
    bag_forward({.input = batch.input(),
                 .table = matrix(w.data(), kFeatures, kDim),
                 .normalise = true,
                 .scale = 4.0,
                 .out = matrix(out.data(), kRows, kDim),
                 .norms = {norms.data(), kRows}});
    Update update{.optimizer = Optimizer::adagrad, .lr = 0.1};
    update.second = matrix(second.data(), kFeatures, 1);
    bag_step({.input = batch.input(),
              .table = matrix(w.data(), kFeatures, kDim),
              .normalise = true,
              .scale = 4.0,
              .out = matrix(out.data(), kRows, kDim),
              .norms = {norms.data(), kRows},
              .grad = matrix(batch.grad.data(), kRows, kDim),
              .update = &update});
    results[i] = w;
    state[i] = second;
    for (std::int64_t b = 0; b < kRows; ++b) {
      double length = 0;
      for (std::int64_t k = 0; k < kDim; ++k) length += double{out[b * kDim + k]} * out[b * kDim + k];
      CHECK_NEAR(std::sqrt(length), b % 5 == 0 ? 0.0 : 4.0, 1e-5);
    }
  }
  set_num_threads(before);
  CHECK(results[0] == results[1]);
  CHECK(state[0] == state[1]);
  CHECK(results[0] != table());
}

TEST(bad_input_changes_nothing) {
  Batch batch;
  std::vector<float> w = table(), out(kRows * kDim);
  const Update update{.lr = 0.5};
  const auto step = [&] {
    bag_step({.input = batch.input(),
              .table = matrix(w.data(), kFeatures, kDim),
              .grad = matrix(batch.grad.data(), kRows, kDim),
              .update = &update});
  };
  batch.indices[17] = kFeatures;
  CHECK_THROWS(LabelError, step(), "feature 977 at position 17");
  batch.indices[17] = -1;
  CHECK_THROWS(LabelError, step(), "feature -1 at position 17");
  batch.indices[17] = 0;
  batch.grad[5] = std::numeric_limits<float>::infinity();
  CHECK_THROWS(NonFiniteError, step(), "grad");
  batch.grad[5] = 0;
  batch.values[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(NonFiniteError, step(), "input");
  batch.values[3] = 0;
  std::swap(batch.indptr[1], batch.indptr[2]);
  CHECK_THROWS(ShapeError, step(), "indptr");
  CHECK(w == table());
}

}  // namespace
