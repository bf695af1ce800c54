// sampling.cc -- draws of classes from a proposal distribution
#include "widehead/sampling.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/backend.h"
#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead {
namespace {

constexpr std::int64_t kBlock = 4096;  // draws a task: some 50 us

// 53 random bits: the classes of a log-uniform draw are resolved up to D of 1e15.
double uniform53(const Philox4& r) {
  const std::uint64_t x = (static_cast<std::uint64_t>(r.v[1]) << 32) | r.v[0];
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

}  // namespace

const char* name_of(Proposal proposal) {
  switch (proposal) {
    case Proposal::uniform: return "uniform";
    case Proposal::log_uniform: return "log_uniform";
    default: return "alias";
  }
}

void sample_classes(const SampleClasses& args) {
  if (args.n_classes < 1) throw ShapeError("n_classes: expected at least 1, got " + std::to_string(args.n_classes));
  if (args.proposal == Proposal::alias && (!args.threshold || !args.alias))
    throw ShapeError("proposal: 'alias' expects the table's threshold and alias, got none");
  if (args.device.kind == Device::Kind::cuda) return cuda::sample_classes(args);
  const RandomStream random{args.seed, Purpose::negatives, args.step};
  const auto classes = static_cast<std::uint64_t>(args.n_classes);
  const double log_classes = std::log1p(static_cast<double>(args.n_classes));
  const auto draw = [&](std::uint64_t i) -> std::int64_t {
    switch (args.proposal) {
      case Proposal::uniform: return static_cast<std::int64_t>(random.below(classes, i, 0));
      case Proposal::log_uniform: {
        // P(C > c) = 1 - log(c + 2) / log(D + 1): invert, and keep rounding from reaching D.
        const double x = std::expm1(uniform53(random.block(i, 0)) * log_classes);
        return std::min(static_cast<std::int64_t>(x), args.n_classes - 1);
      }
      default: {
        const auto column = static_cast<std::int64_t>(random.below(classes, i, 0));  // the block's first two words
        return random.uniform(i, 2) < args.threshold[column] ? column : args.alias[column];
      }
    }
  };
  parallel_for((args.n + kBlock - 1) / kBlock, [&](std::int64_t task) {
    const std::int64_t end = std::min(args.n, (task + 1) * kBlock);
    for (std::int64_t i = task * kBlock; i < end; ++i) args.draws[i] = draw(static_cast<std::uint64_t>(i));
  });
}

void make_alias_table(const double* weight, std::int64_t n_classes, float* threshold, std::int64_t* alias) {
  if (n_classes < 1) throw ShapeError("weight: expected at least one class, got none");
  double sum = 0.0;
  for (std::int64_t c = 0; c < n_classes; ++c) {
    if (!(weight[c] > 0.0) || !std::isfinite(weight[c]))
      throw ShapeError("weight: expected finite positive weights of the classes, got " + std::to_string(weight[c]) +
                       " for class " + std::to_string(c));
    sum += weight[c];
  }
  if (!std::isfinite(sum)) throw ShapeError("weight: expected weights with a finite sum");
  // Columns below the mean are filled up by one above it, whose remainder goes back to either pile.
  std::vector<double> mass(static_cast<std::size_t>(n_classes));
  std::vector<std::int64_t> small, large;
  const double scale = static_cast<double>(n_classes) / sum;
  for (std::int64_t c = 0; c < n_classes; ++c) {
    mass[c] = weight[c] * scale;
    (mass[c] < 1.0 ? small : large).push_back(c);
  }
  while (!small.empty() && !large.empty()) {
    const std::int64_t s = small.back(), l = large.back();
    small.pop_back();
    threshold[s] = static_cast<float>(mass[s]);
    alias[s] = l;
    mass[l] -= 1.0 - mass[s];
    if (mass[l] < 1.0) {
      large.pop_back();
      small.push_back(l);
    }
  }
  // What is left differs from 1 by rounding only.
  for (const auto* pile : {&small, &large})
    for (std::int64_t c : *pile) {
      threshold[c] = 1.0f;
      alias[c] = c;
    }
}

}  // namespace widehead
