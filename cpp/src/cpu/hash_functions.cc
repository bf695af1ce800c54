// hash_functions.cc -- permutations and random signs by the counter-based generator
#include "cpu/hash_functions.h"

#include <algorithm>
#include <numeric>

#include "widehead/random.h"

namespace widehead::cpu {
namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

// Rows of the generator's stream.
constexpr uint64_t kPermutations = 65536;  // a table
constexpr uint64_t kSigns = 1ull << 40;

}  // namespace

HashDraws::HashDraws(int64_t features, const HashOptions& options)
    : functions_{static_cast<int>(options.family),
                 features,
                 options.tables,
                 options.hashes,
                 std::min<int64_t>(options.window, features),
                 key_bits(options) / options.hashes,
                 nullptr,
                 nullptr,
                 (int64_t{options.tables} * options.hashes + 7) / 8 * 8,
                 options.seed} {
  if (options.family == HashFamily::simhash) {
    draw_signs();
  } else {
    draw_places();
  }
}

// A table's windows are disjoint pieces of one permutation: of independent ones some coordinates would decide several codes of a key,
// and a few buckets would hold most rows. Where d is too small for all of them another permutation follows.
void HashDraws::draw_places() {
  HashFunctions& f = functions_;
  const RandomStream random{f.seed, Purpose::hashing, 0};
  const int64_t each = f.features / f.window;
  places_.resize(static_cast<std::size_t>(f.tables * f.hashes * f.window));
  std::vector<std::int32_t> order(static_cast<std::size_t>(f.features));
  for (int64_t t = 0; t < f.tables; ++t)
    for (int64_t first = 0; first < f.hashes; first += each) {
      const uint64_t row = static_cast<uint64_t>(t) * kPermutations + static_cast<uint64_t>(first / each);
      const int64_t wanted = std::min(each, f.hashes - first) * f.window;
      std::iota(order.begin(), order.end(), 0);
      for (int64_t i = 0; i < wanted; ++i) {
        const auto left = static_cast<uint64_t>(f.features - i);
        const auto j = i + static_cast<int64_t>(random.below(left, row, static_cast<uint32_t>(i)));
        std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
      }
      std::copy_n(order.begin(), wanted, places_.begin() + (t * f.hashes + first) * f.window);
    }
  f.places = places_.data();
}

void HashDraws::draw_signs() {
  HashFunctions& f = functions_;
  const RandomStream random{f.seed, Purpose::hashing, 0};
  signs_.assign(static_cast<std::size_t>(f.features * f.padded), 0.0f);
  for (int64_t c = 0; c < f.tables * f.hashes; ++c)
    for (int64_t k = 0; k < f.features; k += 128) {
      const Philox4 r = random.block(kSigns + static_cast<uint64_t>(c), static_cast<uint32_t>(k / 128));
      for (int64_t i = k; i < std::min(f.features, k + 128); ++i)
        signs_[static_cast<std::size_t>(i * f.padded + c)] = (r.v[i % 128 / 32] >> (i % 32)) & 1u ? 1.0f : -1.0f;
    }
  f.signs = signs_.data();
}

int64_t HashDraws::bytes() const {
  return static_cast<int64_t>(places_.size() * sizeof(places_[0]) + signs_.size() * sizeof(signs_[0]));
}

}  // namespace widehead::cpu
