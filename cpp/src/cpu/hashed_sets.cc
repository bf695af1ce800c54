// hashed_sets.cc -- which example of a batch looks at which class: made example by example, then sorted by class
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/hashed_batch.h"
#include "widehead/parallel.h"

namespace widehead::cpu {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

struct Draw {
  i64 cls;
  float times;
};

// The classes of `negatives` in order, and how often each was drawn.
std::vector<Draw> distinct_draws(const i64* negatives, i64 n) {
  std::vector<i64> sorted(negatives, negatives + n);
  std::sort(sorted.begin(), sorted.end());
  std::vector<Draw> out;
  for (const i64 cls : sorted) {
    if (out.empty() || out.back().cls != cls) out.push_back({cls, 0.0f});
    out.back().times += 1.0f;
  }
  return out;
}

struct Member {
  i64 cls;
  float value;  // of a target
  bool target;
  std::int32_t met;  // tables
};

// Candidates and targets of example i, in order of their classes.
void members_of(const HashedForward& args, i64 i, std::vector<Member>& out) {
  out.clear();
  const Labels& t = args.target;
  const i64 begin = t.indptr ? t.indptr[i] : i, end = t.indptr ? t.indptr[i + 1] : i + 1;
  for (i64 j = begin; j < end; ++j) {
    if (!t.indptr && t.indices[j] == args.ignore_index) continue;
    out.push_back({t.indices[j], t.values ? t.values[j] : 1.0f, true, 0});
  }
  if (out.empty()) return;
  for (i64 c = 0; c < args.n_candidates; ++c) {
    const i64 at = i * args.n_candidates + c;
    if (args.candidates[at] >= 0) out.push_back({args.candidates[at], 0.0f, false, args.counts ? args.counts[at] : 0});
  }
  std::sort(out.begin(), out.end(),
            [](const Member& a, const Member& b) { return a.cls != b.cls ? a.cls < b.cls : a.target > b.target; });
  out.erase(std::unique(out.begin(), out.end(), [](const Member& a, const Member& b) { return a.cls == b.cls; }),
            out.end());
}

// One example's part of the batch.
struct Entry {
  u32 cls;
  float value;
  double log_weight;
};

class Sets {
 public:
  explicit Sets(const HashedForward& args)
      : args_(args),
        draws_(distinct_draws(args.negatives, args.n_negatives)),
        n_(static_cast<double>(args.weight.rows)),
        drawn_(args.n_negatives > 0 ? -std::expm1(static_cast<double>(args.n_negatives) * std::log1p(-1.0 / n_)) : 0) {}

  // Appends the example's entries; returns the sum of its targets' values.
  double add(i64 i, std::vector<Entry>& out) {
    members_of(args_, i, members_);
    if (members_.empty()) return 0;
    double mass = 0;
    for (const Member& m : members_) {
      mass += static_cast<double>(m.value);
      out.push_back({static_cast<u32>(m.cls), m.value, log_weight(m)});
    }
    const double factor = weight_of_draws();
    auto member = members_.begin();
    for (const Draw& d : draws_) {
      while (member != members_.end() && member->cls < d.cls) ++member;
      if (member != members_.end() && member->cls == d.cls) continue;
      const double weight = args_.estimator == Estimator::corrected ? static_cast<double>(d.times) * factor : factor;
      out.push_back({static_cast<u32>(d.cls), 0.0f, std::log(weight)});
    }
    return mass;
  }

 private:
  double log_weight(const Member& m) const {
    if (args_.estimator != Estimator::importance || m.target) return 0.0;
    const double tables = args_.tables;
    const double missed = std::pow(1.0 - std::min(1.0, m.met / tables), tables);
    return -std::log(1.0 - (1.0 - drawn_) * missed);
  }
  double weight_of_draws() const {
    if (args_.estimator == Estimator::restricted) return 1.0;
    if (args_.estimator == Estimator::importance) return 1.0 / drawn_;
    double outside = 0;
    auto member = members_.begin();
    for (const Draw& d : draws_) {
      while (member != members_.end() && member->cls < d.cls) ++member;
      if (member == members_.end() || member->cls != d.cls) outside += static_cast<double>(d.times);
    }
    return outside > 0 ? (n_ - static_cast<double>(members_.size())) / outside : 0.0;
  }

  const HashedForward& args_;
  std::vector<Draw> draws_;
  double n_, drawn_;
  std::vector<Member> members_;
};

// The pairs of a range of classes in the order of class and place.
void sort_range(i64 first, i64 last, const std::vector<u32>& cls, std::vector<u32>& order) {
  const auto range = static_cast<std::size_t>(last - first);
  if (range > order.size() * 8) {
    std::sort(order.begin(), order.end(), [&](u32 a, u32 b) { return cls[a] != cls[b] ? cls[a] < cls[b] : a < b; });
    return;
  }
  std::vector<u32> ends(range + 1, 0), sorted(order.size());
  for (const u32 place : order) ++ends[cls[place] - static_cast<u32>(first) + 1];
  for (std::size_t c = 0; c < range; ++c) ends[c + 1] += ends[c];
  for (const u32 place : order) sorted[ends[cls[place] - static_cast<u32>(first)]++] = place;
  order.swap(sorted);
}

}  // namespace

void CpuHashedBatch::copy_rows(i64* out) const { std::copy(classes.begin(), classes.end(), out); }

HashedRows CpuHashedBatch::view(i64 part, AnyMatrix weight, AnyVector bias) const {
  const i64 first = parts[static_cast<std::size_t>(part)], last = parts[static_cast<std::size_t>(part) + 1];
  const void* hidden = wide ? static_cast<const void*>(hidden64.data()) : hidden32.data();
  return {classes.data() + first,
          segments.data() + first,
          last - first,
          by_class_example.data(),
          by_class_place.data(),
          hidden,
          features,
          weight,
          bias};
}

void make_sets(const HashedForward& args, CpuHashedBatch& batch) {
  constexpr i64 kGroup = 16;  // examples a task
  constexpr i64 kParts = 64;  // of the classes, each a task
  const i64 examples = args.hidden.rows, groups = (examples + kGroup - 1) / kGroup;
  std::vector<std::vector<Entry>> entries(static_cast<std::size_t>(groups));
  std::vector<std::vector<i64>> ends(static_cast<std::size_t>(groups));
  batch.mass.assign(static_cast<std::size_t>(examples), 0.0);
  parallel_for(groups, [&](i64 g) {
    Sets sets(args);
    auto& own = entries[static_cast<std::size_t>(g)];
    for (i64 i = g * kGroup; i < std::min(examples, (g + 1) * kGroup); ++i) {
      batch.mass[static_cast<std::size_t>(i)] = sets.add(i, own);
      ends[static_cast<std::size_t>(g)].push_back(static_cast<i64>(own.size()));
    }
  });
  batch.indptr.assign(1, 0);
  std::vector<i64> starts;
  for (i64 g = 0; g < groups; ++g) {
    starts.push_back(batch.indptr.back());
    for (const i64 end : ends[static_cast<std::size_t>(g)]) batch.indptr.push_back(starts.back() + end);
  }
  const auto pairs = static_cast<std::size_t>(batch.indptr.back());
  std::vector<u32> cls(pairs), example(pairs);
  batch.log_weights.resize(pairs);
  batch.values.resize(pairs);
  const i64 range = (args.weight.rows + kParts - 1) / kParts;
  const auto part_of = [&](u32 c) { return static_cast<std::size_t>(i64{c} / range); };
  std::vector<std::vector<std::vector<u32>>> places(static_cast<std::size_t>(groups));  // by group and part
  parallel_for(groups, [&](i64 g) {
    auto& mine = places[static_cast<std::size_t>(g)];
    mine.resize(kParts);
    i64 at = starts[static_cast<std::size_t>(g)], i = g * kGroup;
    for (const Entry& e : entries[static_cast<std::size_t>(g)]) {
      while (at >= batch.indptr[static_cast<std::size_t>(i) + 1]) ++i;
      const auto place = static_cast<std::size_t>(at);
      cls[place] = e.cls;
      example[place] = static_cast<u32>(i);
      batch.log_weights[place] = e.log_weight;
      batch.values[place] = e.value;
      mine[part_of(e.cls)].push_back(static_cast<u32>(at++));
    }
  });
  std::vector<std::vector<u32>> orders(kParts);
  std::vector<std::vector<i64>> rows(kParts), segments(kParts);
  parallel_for(kParts, [&](i64 p) {
    const auto part = static_cast<std::size_t>(p);
    auto& order = orders[part];
    for (const auto& of_group : places) order.insert(order.end(), of_group[part].begin(), of_group[part].end());
    if (order.empty()) return;
    sort_range(p * range, std::min(args.weight.rows, (p + 1) * range), cls, order);
    for (std::size_t j = 0; j < order.size(); ++j)
      if (j == 0 || cls[order[j]] != cls[order[j - 1]]) {
        rows[part].push_back(cls[order[j]]);
        segments[part].push_back(static_cast<i64>(j));
      }
  });
  batch.parts.assign(1, 0);
  batch.classes.clear();
  batch.segments.clear();
  std::vector<i64> offsets;
  i64 offset = 0;
  for (std::size_t p = 0; p < kParts; ++p) {
    offsets.push_back(offset);
    batch.classes.insert(batch.classes.end(), rows[p].begin(), rows[p].end());
    for (const i64 s : segments[p]) batch.segments.push_back(offset + s);
    batch.parts.push_back(static_cast<i64>(batch.classes.size()));
    offset += static_cast<i64>(orders[p].size());
  }
  batch.segments.push_back(offset);
  batch.by_class_place.resize(pairs);
  batch.by_class_example.resize(pairs);
  parallel_for(kParts, [&](i64 p) {
    auto at = static_cast<std::size_t>(offsets[static_cast<std::size_t>(p)]);
    for (const u32 place : orders[static_cast<std::size_t>(p)]) {
      batch.by_class_place[at] = place;
      batch.by_class_example[at++] = example[place];
    }
  });
}

}  // namespace widehead::cpu
