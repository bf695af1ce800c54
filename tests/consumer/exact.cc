// exact.cc -- a C++ program that trains an ExactHead over its own memory, with a loss of its own, beside plain SGD
#include <widehead/widehead.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

constexpr std::int64_t kBatch = 6, kFeatures = 5, kClasses = 40;
constexpr double kRate = 0.02, kOthers = 0.1;

std::vector<double> uniform(std::int64_t size, std::uint64_t seed) {
  const widehead::RandomStream random{seed};
  std::vector<double> values(static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 2 * static_cast<double>(random.uniform(i, 0)) - 1;
  return values;
}

int fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  return 1;
}

// sum (o_target - 1)^2 + kOthers sum o^2, by all outputs: what the head never does.
void plain_step(std::vector<double>& weight, const std::vector<double>& hidden,
                const std::vector<std::int64_t>& target) {
  const std::vector<double> before = weight;
  for (std::size_t c = 0; c < kClasses; ++c)
    for (std::size_t i = 0; i < kBatch; ++i) {
      double output = 0;
      for (std::size_t k = 0; k < kFeatures; ++k) output += before[c * kFeatures + k] * hidden[i * kFeatures + k];
      double slope = 2 * kOthers * output;
      if (target[i] == static_cast<std::int64_t>(c)) slope += 2 * (output - 1);
      for (std::size_t k = 0; k < kFeatures; ++k)
        weight[c * kFeatures + k] -= kRate * slope * hidden[i * kFeatures + k];
    }
}

}  // namespace

int main() {
  std::vector<double> weight = uniform(kClasses * kFeatures, 1), plain = weight;
  widehead::ExactHead head(widehead::matrix(weight.data(), kClasses, kFeatures), {}, {});
  std::vector<double> hidden, A(kBatch), q(kBatch), s(kBatch);
  std::vector<std::int64_t> target(kBatch);
  const widehead::Labels labels{.indices = target.data(), .rows = kBatch, .n_classes = kClasses};

  for (std::uint64_t step = 0; step < 200; ++step) {
    hidden = uniform(kBatch * kFeatures, 2 + step);
    for (std::size_t i = 0; i < target.size(); ++i)
      target[i] = static_cast<std::int64_t>((step * step + 7 * i) % static_cast<std::uint64_t>(kClasses));
    const auto batch =
        head.forward(widehead::matrix(hidden.data(), kBatch, kFeatures), labels, true, A.data(), q.data(), s.data());
    std::vector<double> grad_A(A), grad_q(kBatch, kOthers), grad_s(kBatch, 0.0), grad_hidden(kBatch * kFeatures);
    for (double& a : grad_A) a = 2 * (a - 1);
    head.backward(*batch, grad_A.data(), grad_q.data(), grad_s.data(),
                  widehead::matrix(grad_hidden.data(), kBatch, kFeatures));
    head.step({.lr = kRate});
    plain_step(plain, hidden, target);
  }
  head.consolidate();
  double off = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) off = std::max(off, std::fabs(weight[i] - plain[i]));
  std::printf("%lld steps, %.1e from plain SGD\n", static_cast<long long>(head.diagnostics().steps), off);
  if (!(off < 1e-12)) return fail("not the weights of plain SGD");

  // A hidden state that is not finite is refused with its place, and nothing has changed.
  const std::vector<double> before = weight;
  hidden[7] = std::numeric_limits<double>::quiet_NaN();
  try {
    head.forward(widehead::matrix(hidden.data(), kBatch, kFeatures), labels, true, A.data(), q.data(), s.data());
    return fail("a NaN was taken");
  } catch (const widehead::NonFiniteError& e) {
    std::printf("refused: %s\n", e.what());
  }
  head.consolidate();
  return weight == before ? 0 : fail("a refused call changed the weights");
}
