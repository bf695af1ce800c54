// exact_test.cc -- the exact head against dense SGD in float64, and the inverse that the woodbury method takes
#include "widehead/exact.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/exact_inverse.h"

namespace {

using namespace widehead;
using cpu::Dense;
using i64 = std::int64_t;

constexpr i64 kClasses = 50, kFeatures = 6, kBatch = 4, kTargets = 2;

Dense<double> normal(i64 rows, i64 cols, unsigned seed) {
  std::mt19937 random(seed);
  Dense<double> out(rows, cols);
  for (double& x : out.data) x = double(random()) * 0x1p-31 - 1.0;
  return out;
}

AnyMatrix any(Dense<double>& m) { return {m.data.data(), Dtype::f64, m.rows, m.cols, m.cols}; }

struct Batch {
  Dense<double> hidden;
  std::vector<i64> indptr, ids;
  std::vector<double> A, q, s, grad_A, grad_q, grad_s;

  explicit Batch(unsigned seed) : hidden(normal(kBatch, kFeatures, seed)), indptr{0} {
    for (i64 i = 0; i < kBatch; ++i) {
      const i64 first = (7 * seed + 3 * i) % (kClasses - 1);
      ids.insert(ids.end(), {first, first + 1});
      indptr.push_back(static_cast<i64>(ids.size()));
    }
    A.resize(ids.size());
    grad_A.resize(ids.size());
    for (auto* v : {&q, &s, &grad_q, &grad_s}) v->resize(kBatch);
  }
  Labels target() const {
    Labels out{};
    out.indptr = indptr.data();
    out.indices = ids.data();
    out.rows = kBatch;
    out.size = static_cast<i64>(ids.size());
    out.n_classes = kClasses;
    return out;
  }
  void step(ExactHead& head, double lr) {
    const auto kept = head.forward(any(hidden), target(), true, A.data(), q.data(), s.data());
    spherical_loss({SphericalLoss::taylor_softmax}, target(), A.data(), q.data(), s.data(), nullptr, grad_A.data(),
                   grad_q.data(), grad_s.data());
    head.backward(*kept, grad_A.data(), grad_q.data(), grad_s.data(), {});
    head.step({.lr = lr});
  }
  void step(Dense<double>& weight, double lr) const {
    Dense<double> gradient = Dense<double>::zeros(kClasses, kFeatures);
    for (i64 i = 0; i < kBatch; ++i)
      for (i64 c = 0; c < kClasses; ++c) {
        double output = 0;
        for (i64 k = 0; k < kFeatures; ++k) output += weight.at(c, k) * hidden.at(i, k);
        const auto at = static_cast<std::size_t>(i);
        double by_output = 2 * grad_q[at] * output + grad_s[at];
        for (i64 t = indptr[at]; t < indptr[at + 1]; ++t)
          if (ids[static_cast<std::size_t>(t)] == c) by_output += grad_A[static_cast<std::size_t>(t)];
        for (i64 k = 0; k < kFeatures; ++k) gradient.at(c, k) += by_output * hidden.at(i, k);
      }
    for (std::size_t i = 0; i < weight.data.size(); ++i) weight.data[i] -= lr * gradient.data[i];
  }
};

void check_method(ExactMethod method) {
  Dense<double> weight = normal(kClasses, kFeatures, 1), dense = weight;
  ExactHead head(any(weight), {}, {.method = method, .radix = 3});
  for (unsigned step = 0; step < 50; ++step) {
    Batch batch(step + 2);
    batch.step(head, 0.1);
    batch.step(dense, 0.1);
  }
  double farthest = 0;
  const ExactDiagnostics found = head.diagnostics();
  CHECK_EQ(found.steps, 50);
  CHECK_NEAR(found.gram_error, 0, 1e-12);
  head.consolidate();
  for (std::size_t i = 0; i < weight.data.size(); ++i)
    farthest = std::max(farthest, std::fabs(weight.data[i] - dense.data[i]));
  CHECK_NEAR(farthest, 0, 1e-12);
}
TEST(blocked_equals_dense_sgd) { check_method(ExactMethod::blocked); }
TEST(woodbury_equals_dense_sgd) { check_method(ExactMethod::woodbury); }

TEST(a_refused_batch_changes_nothing) {
  Dense<double> weight = normal(kClasses, kFeatures, 1), other = weight;
  ExactHead head(any(weight), {}, {}), twin(any(other), {}, {});
  for (unsigned step = 0; step < 6; ++step) {
    Batch bad(step + 2), good(step + 2);
    bad.hidden.at(kBatch - 1, 0) = std::numeric_limits<double>::quiet_NaN();
    CHECK_THROWS(NonFiniteError, bad.step(head, 0.1), "hidden");
    bad = Batch(step + 2);
    bad.ids.back() = kClasses;
    CHECK_THROWS(LabelError, bad.step(head, 0.1), "target");
    good.step(head, 0.1);
    good.step(twin, 0.1);
  }
  head.consolidate();
  twin.consolidate();
  CHECK(weight.data == other.data);
}

TEST(inverse_of_any_regular_matrix) {
  for (const i64 n : {1, 2, 7, 40}) {
    Dense<double> a = normal(n, n, 3), inverse = a, one(n, n);
    if (n > 1) a.at(0, 0) = inverse.at(0, 0) = 0;  // wants a pivot from below
    CHECK(cpu::invert(inverse));
    cpu::product(a, false, inverse, false, one);
    for (i64 r = 0; r < n; ++r)
      for (i64 c = 0; c < n; ++c) CHECK_NEAR(one.at(r, c), r == c, 1e-11);
  }
}
TEST(no_inverse_of_a_singular_matrix) {
  Dense<double> zero = Dense<double>::zeros(1, 1), rank_one(3, 3), unknown = Dense<double>::zeros(2, 2);
  for (i64 r = 0; r < 3; ++r)
    for (i64 c = 0; c < 3; ++c) rank_one.at(r, c) = double((r + 1) * (c + 2));
  unknown.at(0, 0) = unknown.at(1, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(!cpu::invert(zero));
  CHECK(!cpu::invert(rank_one));
  CHECK(!cpu::invert(unknown));
}

}  // namespace
