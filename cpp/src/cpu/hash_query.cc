// hash_query.cc -- which rows share most buckets with a query
//
// The rows of all the query's buckets are counted range of rows by range, so that the counters stay in the first-level cache however many
// rows there are.
#include <algorithm>
#include <cstring>

#include "cpu/hash_tables.h"
#include "cpu/kernels.h"
#include "widehead/parallel.h"

namespace widehead {
namespace {

using cpu::i64;
using cpu::u32;

constexpr int kRangeBits = 15;
constexpr u32 kRange = 1u << kRangeBits;

struct Found {
  u32 id, count;
};

class Counter {
 public:
  explicit Counter(i64 rows)
      : ranges_(static_cast<std::size_t>((rows + kRange - 1) >> kRangeBits)), fill_(ranges_), counters_(kRange, 0) {}

  void begin() {
    spans_.clear();
    raw_ = 0;
  }
  void add(const u32* ids, i64 n) {
    if (n == 0) return;
    spans_.push_back({ids, n});
    raw_ += n;
  }
  void add_one(u32 id) { singles_.push_back(id); }

  // The rows seen, range by range, with their counts, and how many have each.
  const std::vector<Found>& count() {
    if (!singles_.empty()) add(singles_.data(), static_cast<i64>(singles_.size()));
    scatter();
    found_.clear();
    std::memset(histogram_, 0, sizeof histogram_);
    const u32* at = sorted_.data();
    for (std::size_t range = 0; range < ranges_; ++range) {
      const u32* const end = sorted_.data() + fill_[range];
      const std::size_t first = found_.size();
      for (; at != end; ++at) {
        std::uint8_t& counter = counters_[*at & (kRange - 1)];
        if (counter++ == 0) found_.push_back({*at, 0});
      }
      for (std::size_t i = first; i < found_.size(); ++i) {
        std::uint8_t& counter = counters_[found_[i].id & (kRange - 1)];
        found_[i].count = counter;
        ++histogram_[counter];
        counter = 0;
      }
    }
    singles_.clear();
    return found_;
  }
  const i64* histogram() const { return histogram_; }

 private:
  void scatter() {
    sorted_.resize(static_cast<std::size_t>(raw_));
    std::fill(fill_.begin(), fill_.end(), i64{0});
    for (const auto& [ids, n] : spans_)
      for (i64 i = 0; i < n; ++i) ++fill_[ids[i] >> kRangeBits];
    i64 end = 0;
    for (i64& f : fill_) {
      const i64 size = f;
      f = end;
      end += size;
    }
    for (const auto& [ids, n] : spans_)
      for (i64 i = 0; i < n; ++i) sorted_[static_cast<std::size_t>(fill_[ids[i] >> kRangeBits]++)] = ids[i];
  }

  std::size_t ranges_;
  std::vector<i64> fill_;
  std::vector<std::uint8_t> counters_;
  std::vector<std::pair<const u32*, i64>> spans_;
  std::vector<u32> sorted_, singles_;
  std::vector<Found> found_;
  i64 histogram_[256] = {};
  i64 raw_ = 0;
};

// At most `wanted` of the rows: most collisions first, of equals the lowest.
void select(const std::vector<Found>& found, const i64* histogram, i64 wanted, bool ranked, std::vector<Found>& out) {
  u32 least = 256;
  i64 above = 0;
  while (least > 1 && above < wanted) above += histogram[--least];
  out.clear();
  if (above > wanted) {
    // Of the rows with the least count only the lowest have a place.
    const i64 places = wanted - (above - histogram[least]);
    std::vector<u32> equals;
    for (const Found& f : found)
      if (f.count == least) equals.push_back(f.id);
    std::nth_element(equals.begin(), equals.begin() + (places - 1), equals.end());
    const u32 last = equals[static_cast<std::size_t>(places - 1)];
    for (const Found& f : found)
      if (f.count > least || (f.count == least && f.id <= last)) out.push_back(f);
  } else {
    for (const Found& f : found)
      if (f.count >= least) out.push_back(f);
  }
  if (!ranked) return;
  std::sort(out.begin(), out.end(),
            [](const Found& a, const Found& b) { return a.count != b.count ? a.count > b.count : a.id < b.id; });
}

// Keys of a table beside the first: those with the most narrowly decided codes changed.
class Probes {
 public:
  Probes(const cpu::HashFunctions& f, const float* margins, const std::uint8_t* seconds)
      : f_(f), margins_(margins), seconds_(seconds), order_(static_cast<std::size_t>(f.hashes)) {}

  template <class Visit>
  void visit(i64 table, u32 key, int probes, Visit visit) {
    const float* margin = margins_ + table * f_.hashes;
    for (i64 j = 0; j < f_.hashes; ++j) order_[static_cast<std::size_t>(j)] = j;
    std::stable_sort(order_.begin(), order_.end(), [&](i64 a, i64 b) { return margin[a] < margin[b]; });
    const u32 mask = (1u << f_.bits) - 1;
    for (int p = 0; p < probes; ++p) {
      const i64 j = order_[static_cast<std::size_t>(p)];
      const int shift = static_cast<int>(j) * f_.bits;
      const u32 other = (key & ~(mask << shift)) | (u32{seconds_[table * f_.hashes + j]} << shift);
      if (other != key) visit(other);
    }
  }

 private:
  const cpu::HashFunctions& f_;
  const float* margins_;
  const std::uint8_t* seconds_;
  std::vector<i64> order_;
};

}  // namespace

void HashTables::query(const HashQuery& q) const {
  if (rows == 0) {
    std::fill_n(q.ids, q.hidden.rows * q.candidates, i64{-1});
    if (q.counts) std::fill_n(q.counts, q.hidden.rows * q.candidates, 0);
    return;
  }
  const cpu::HashKernels& kernels = cpu::kernels().hash;
  const cpu::HashFunctions& f = draws_.functions();
  const i64 codes = f.tables * f.hashes, group = kernels.lanes, batch = q.hidden.rows;
  parallel_for((batch + group - 1) / group, [&](i64 task) {
    const i64 first = task * group, n = std::min(group, batch - first);
    std::vector<float> scratch(static_cast<std::size_t>(cpu::hash_scratch(f, kernels.lanes)));
    std::vector<float> margins(static_cast<std::size_t>(q.probes > 0 ? n * codes : 0));
    std::vector<std::uint8_t> seconds(margins.size());
    std::vector<u32> keys(static_cast<std::size_t>(f.tables * n));
    kernels.rows({&f,
                  q.hidden,
                  {},
                  bias,
                  nullptr,
                  first,
                  n,
                  keys.data(),
                  n,
                  q.probes > 0 ? margins.data() : nullptr,
                  seconds.data()},
                 scratch.data());
    Counter counter(rows);
    std::vector<Found> best;
    for (i64 i = 0; i < n; ++i) {
      counter.begin();
      for (i64 t = 0; t < f.tables; ++t) {
        const cpu::HashTable& table = tables_[static_cast<std::size_t>(t)];
        const u32 key = keys[static_cast<std::size_t>(t * n + i)];
        if (key == cpu::kNoKey) break;  // of all tables
        const auto take = [&](u32 of) {
          const auto bucket = table.bucket(of);
          i64 size = bucket.size;
          if (!table.has_spilled()) {
            if (options.max_bucket == 0 || size <= options.max_bucket) counter.add(bucket.begin, size);
            return;
          }
          const auto [spilled, end] = table.spilled(of);
          size += end - spilled;
          if (options.max_bucket > 0 && size > options.max_bucket) return;
          counter.add(bucket.begin, bucket.size);
          for (const auto* s = spilled; s != end; ++s) counter.add_one(s->id);
        };
        take(key);
        if (q.probes > 0)
          Probes(f, margins.data() + i * codes, seconds.data() + i * codes).visit(t, key, q.probes, take);
      }
      const std::vector<Found>& found = counter.count();
      select(found, counter.histogram(), q.candidates, q.ranked, best);
      i64* ids = q.ids + (first + i) * q.candidates;
      std::int32_t* counts = q.counts ? q.counts + (first + i) * q.candidates : nullptr;
      for (i64 c = 0; c < q.candidates; ++c) {
        const bool there = c < static_cast<i64>(best.size());
        ids[c] = there ? i64{best[static_cast<std::size_t>(c)].id} : -1;
        if (counts) counts[c] = there ? static_cast<std::int32_t>(best[static_cast<std::size_t>(c)].count) : 0;
      }
    }
  });
}

}  // namespace widehead
