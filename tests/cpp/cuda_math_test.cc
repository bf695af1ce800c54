// cuda_math_test.cc -- the arithmetic that kernels and host share, on the host: losses, sums, rounding, indices
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"
#include "cuda/loss_math.h"
#include "widehead/fault.h"

namespace {

using namespace widehead;
using namespace widehead::cuda;

constexpr double kInf = std::numeric_limits<double>::infinity();

template <Loss kLoss>
double loss_of(double z, double y, double w) {
  if (kLoss == Loss::bce) return w * (std::log1p(std::exp(-std::fabs(z))) + std::max(z, 0.0) - y * z);
  const double miss = std::max(0.0, 1 + z), hit = std::max(0.0, 1 - z);
  return y > 0 ? w * y * hit * hit : w * miss * miss;
}

template <Loss kLoss>
void check_loss() {
  for (double z : {-30.0, -1.5, -1.0, -0.3, 0.0, 0.7, 1.0, 1.2, 25.0})
    for (double w : {1.0, 0.4}) {
      const double own = class_loss<kLoss>(z) * w;
      CHECK_NEAR(own, loss_of<kLoss>(z, 0, w), 1e-12 * (1 + own));
      for (double y : {1.0, 0.5}) {
        const double with = own + target_loss<kLoss>(z, y, w);
        CHECK_NEAR(with, loss_of<kLoss>(z, y, w), 1e-12 * (1 + std::fabs(own)));
        // Derivatives by central differences of the losses, away from the kinks.
        if (std::fabs(std::fabs(z) - 1) < 1e-3) continue;
        const double h = 1e-6, g = 0.7;
        const double slope = (loss_of<kLoss>(z + h, y, w) - loss_of<kLoss>(z - h, y, w)) / (2 * h) * g;
        const double got = class_gradient<kLoss>(z, 0.0, g, 0.0, w) + target_gradient<kLoss>(z, y, w, g, 0.0, 0.0);
        CHECK_NEAR(got, slope, 1e-7 * (1 + std::fabs(slope)) + 1e-8);
      }
    }
}

TEST(bce) { check_loss<Loss::bce>(); }
TEST(squared_hinge) { check_loss<Loss::squared_hinge>(); }

TEST(softmax_terms) {
  CHECK_NEAR(class_gradient<Loss::softmax>(0.0, 0.25, 2.0, 0.1, 3.0), 0.25 * 2 - 0.1 * 3, 1e-15);
  CHECK_NEAR(target_gradient<Loss::softmax>(5.0, 0.5, 2.0, 3.0, 7.0, 0.1), 7 * 0.5 - 3 * 0.9 * 0.5 * 2, 1e-15);
  CHECK_NEAR(target_loss<Loss::softmax>(3.0, 0.5, 2.0), 3.0, 1e-15);
}

TEST(nan_stays) {
  const double nan = std::nan("");
  CHECK(std::isnan(class_loss<Loss::bce>(nan)) && std::isnan(class_loss<Loss::squared_hinge>(nan)));
  CHECK(std::isnan(class_gradient<Loss::bce>(nan, 0.0, 1.0, 0.0, 1.0)));
  CHECK(std::isnan(class_gradient<Loss::squared_hinge>(nan, 0.0, 1.0, 0.0, 1.0)));
  CHECK(std::isnan(hinge(nan)) && hinge(-2) == 0 && hinge(3) == 9);
  CHECK(std::isnan(cap_slope(nan, 2.0)));
}

TEST(soft_cap) {
  for (double z : {-9.0, -0.5, 0.0, 2.0, 40.0}) {
    CHECK_EQ(capped(z, 0.0), z);
    CHECK_NEAR(capped(z, 3.0), 3 * std::tanh(z / 3), 1e-14);
    const double h = 1e-6, slope = (capped(z + h, 3.0) - capped(z - h, 3.0)) / (2 * h);
    CHECK_NEAR(cap_slope(capped(z, 3.0), 3.0), slope, 1e-8);
  }
  CHECK_EQ(cap_slope(4.0, 0.0), 1.0);
  CHECK_EQ(cap_slope(-kInf, 3.0), 0.0);
}

// Merging in any grouping gives the log-sum-exp, also where one side is empty or the terms are far apart.
TEST(merged_sums) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal(0, 40);
  for (int n : {1, 2, 3, 17, 1000}) {
    LogSum<double> left = empty_sum<double>(), right = empty_sum<double>();
    long double top = -kInf, sum = 0;
    std::vector<double> z(static_cast<std::size_t>(n));
    for (double& x : z) top = std::max<long double>(top, x = normal(random));
    for (double x : z) sum += std::exp(static_cast<long double>(x) - top);
    for (std::size_t i = 0; i < z.size(); ++i) {
      LogSum<double>& s = i % 3 ? left : right;
      s = merged(s, {z[i], 1.0});
    }
    for (const LogSum<double>& s :
         {merged(left, right), merged(right, left), merged(merged(left, empty_sum<double>()), right)})
      CHECK_NEAR(s.max + std::log(s.sum), static_cast<double>(top + std::log(sum)),
                 1e-12 * static_cast<double>(1 + std::fabs(top)));
  }
  const LogSum<float> nothing = merged(empty_sum<float>(), empty_sum<float>());
  CHECK_EQ(nothing.sum, 0.0f);
  CHECK(std::isfinite(nothing.max));
}

// 1e8 terms of float32 lose nothing: the sum of 2^24 + many ones moves.
TEST(compensated_sum) {
  float total = 16777216.0f, lost = 0;
  for (int i = 0; i < 1000; ++i) kahan_add(total, lost, 1.0f);
  CHECK_NEAR(static_cast<double>(total) - static_cast<double>(lost), 16778216.0, 1.0);
  kahan_add(total, lost, std::numeric_limits<float>::infinity());
  kahan_add(total, lost, 1.0f);
  CHECK(std::isinf(total) && lost == 0.0f);
}

TEST(faults_become_errors) {
  raise_fault({});
  const auto record = [](Fault f, Argument a) {
    return FaultRecord{static_cast<std::int64_t>(f), static_cast<std::int64_t>(a), 5, 77, 40};
  };
  CHECK_THROWS(LabelError, raise_fault(record(Fault::label_range, Argument::target)), "target: label 77 at position 5");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::label_range, Argument::target)), "expected 0 to 39");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::label_repeated, Argument::target)), "distinct");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::row_pointer, Argument::exclude)),
               "exclude: row pointer 77 of row 5");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::label_weight, Argument::target)), "finite");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::row_range, Argument::classes)),
               "classes: expected a class in [0, 40), got 77");
  CHECK_THROWS(LabelError, raise_fault(record(Fault::row_repeated, Argument::rows)),
               "rows: expected distinct rows, got 77");
  CHECK_THROWS(NonFiniteError, raise_fault(record(Fault::non_finite, Argument::grad_losses)), "grad_losses");
  CHECK_THROWS(ShapeError, raise_fault(record(Fault::index_range, Argument::index)),
               "index: expected inputs in [0, 40), got 77 at row 5");
  CHECK_THROWS(ShapeError, raise_fault(record(Fault::index_order, Argument::index)), "got 40 before 77 in row 5");
  for (int a = 0; a <= static_cast<int>(Argument::index); ++a) CHECK(name_of(static_cast<Argument>(a))[0] != '\0');
}

}  // namespace
