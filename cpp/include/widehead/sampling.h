// sampling.h -- the shared negatives of sampled softmax: draws of classes from a proposal distribution
//
// Draw i is a function of (seed, Purpose::negatives, step, row i) alone. With a class's number of draws m_c out of n,
// m_c / (n q_c) is the weight that makes sum_c m_c / (n q_c) exp(z_c) an unbiased estimate of sum_c exp(z_c)
// (Bengio & Senecal, "Adaptive importance sampling", IEEE TNN 2008).
#pragma once
#include <cstdint>

#include "widehead/view.h"

namespace widehead {

// uniform      q_c = 1 / D
// log_uniform  q_c = log((c + 2) / (c + 1)) / log(D + 1): Zipf's law, for classes sorted by falling frequency
// alias        any q, by Walker's alias method (ACM TOMS 1977)
enum class Proposal : std::uint8_t { uniform, log_uniform, alias };
const char* name_of(Proposal proposal);

// draws[i] in [0, n_classes), with replacement. `threshold` and `alias` ([n_classes], from make_alias_table) are read
// by Proposal::alias only. Throws ShapeError for n_classes < 1 or a missing table. The same draws for any number of
// threads.
struct SampleClasses {
  std::int64_t* draws = nullptr;  // [n]
  std::int64_t n = 0;
  std::int64_t n_classes = 0;
  Proposal proposal = Proposal::uniform;
  const float* threshold = nullptr;
  const std::int64_t* alias = nullptr;
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  const std::int64_t* device_seed = nullptr;  // GPU: [1], in the place of seed
  Device device = {};
};
void sample_classes(const SampleClasses& args);

// The alias table of the distribution q_c = weight_c / sum(weight): a column is drawn uniformly and gives itself with
// probability threshold[c], alias[c] otherwise. O(D) time (Vose, IEEE TSE 1991). `threshold` is float32, so that q_c is
// met to about 1e-7 / D. Throws ShapeError, naming the class, unless all weights are finite and positive.
void make_alias_table(const double* weight, std::int64_t n_classes, float* threshold, std::int64_t* alias);

}  // namespace widehead
