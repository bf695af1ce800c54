// rewire.cc -- moves the weakest connections of a sparse layer to other inputs
#include "widehead/rewire.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <unordered_set>
#include <vector>

#include "check.h"
#include "cuda/backend.h"
#include "rewire_math.h"
#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead {
namespace {

using std::int64_t;
using std::size_t;
using std::to_string;
using std::uint32_t;

constexpr int64_t kRows = 512;  // rows of the index in a task
constexpr size_t kBins = size_t{1} << 16;

double element(const AnyMatrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.stride + col;
  switch (m.dtype) {
    case Dtype::f64: return static_cast<const double*>(m.data)[at];
    case Dtype::f32: return static_cast<double>(static_cast<const float*>(m.data)[at]);
    default: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(m.data)[at]));
  }
}

// One row of the index and the rows of weight and state that go with it.
class Row {
 public:
  Row(const Rewire& args, int64_t row) : args_(args), row_(row) {
    const int64_t classes = args.weight.rows;
    first_ = row * args.group_size;
    end_ = std::min(classes, first_ + args.group_size);
  }

  int64_t input(int64_t k) const {
    const int64_t at = row_ * args_.index_stride + k;
    return args_.index_dtype == Dtype::u16 ? static_cast<const std::uint16_t*>(args_.index)[at]
                                           : static_cast<const std::int32_t*>(args_.index)[at];
  }
  void set_input(int64_t k, int64_t input) const {
    const int64_t at = row_ * args_.index_stride + k;
    if (args_.index_dtype == Dtype::u16) {
      static_cast<std::uint16_t*>(args_.index)[at] = static_cast<std::uint16_t>(input);
    } else {
      static_cast<std::int32_t*>(args_.index)[at] = static_cast<std::int32_t>(input);
    }
  }

  uint32_t strength(int64_t k) const {
    double sum = 0;
    for (int64_t c = first_; c < end_; ++c) sum += std::abs(element(args_.weight, c, k));
    return strength_bits(sum, end_ - first_);
  }

  // Column k of every row becomes column order[k] of before; moved ones lose weight and state.
  void reorder(const std::vector<int64_t>& order, const std::vector<char>& moved) const {
    for (const AnyMatrix* m : {&args_.weight, &args_.first, &args_.second, &args_.compensation}) {
      if (!*m) continue;
      const bool keep = m == &args_.weight && args_.keep_value;
      switch (m->dtype) {
        case Dtype::f64: reorder_as<double>(*m, order, moved, keep); break;
        case Dtype::f32: reorder_as<float>(*m, order, moved, keep); break;
        default: reorder_as<std::uint16_t>(*m, order, moved, keep);
      }
    }
  }

 private:
  template <class T>
  void reorder_as(const AnyMatrix& m, const std::vector<int64_t>& order, const std::vector<char>& moved,
                  bool keep) const {
    std::vector<T> before(order.size());
    for (int64_t c = first_; c < end_; ++c) {
      T* row = static_cast<T*>(m.data) + c * m.stride;
      std::copy_n(row, order.size(), before.begin());
      for (size_t k = 0; k < order.size(); ++k) {
        const auto from = static_cast<size_t>(order[k]);
        row[k] = moved[from] && !keep ? T{} : before[from];
      }
    }
  }

  const Rewire& args_;
  int64_t row_, first_, end_;
};

struct Layout {
  int64_t rows, fan_in, tasks;
};

Layout layout_of(const Rewire& args) {
  const int64_t rows = (args.weight.rows + args.group_size - 1) / args.group_size;
  return {rows, args.weight.cols, (rows + kRows - 1) / kRows};
}

template <class F>
void for_rows(const Layout& l, int64_t task, F f) {
  for (int64_t row = task * kRows; row < std::min(l.rows, (task + 1) * kRows); ++row) f(row);
}

// Counts of bin(strength) over all connections, as far as bin() gives one; the tasks' counts are added in order.
template <class Bin>
std::vector<int64_t> histogram(const Rewire& args, const Layout& l, Bin bin) {
  // A table for each of a few stripes of tasks, so that memory does not grow with the classes.
  const int64_t stripes = std::min<int64_t>(l.tasks, 8);
  std::vector<std::vector<int64_t>> counts(static_cast<size_t>(stripes), std::vector<int64_t>(kBins, 0));
  parallel_for(stripes, [&](int64_t stripe) {
    std::vector<int64_t>& mine = counts[static_cast<size_t>(stripe)];
    for (int64_t task = stripe; task < l.tasks; task += stripes)
      for_rows(l, task, [&](int64_t r) {
        const Row row(args, r);
        for (int64_t k = 0; k < l.fan_in; ++k) {
          const int64_t at = bin(row.strength(k));
          if (at >= 0) ++mine[static_cast<size_t>(at)];
        }
      });
  });
  for (size_t stripe = 1; stripe < counts.size(); ++stripe)
    for (size_t i = 0; i < kBins; ++i) counts[0][i] += counts[stripe][i];
  return counts[0];
}

// Everything below `bits` goes, and of those equal to it the first `ties` in order of row and input.
struct Cut {
  uint32_t bits = 0;
  int64_t ties = 0;
};

// The bin that the `wanted`-th number falls into; `wanted` becomes its rank there.
int64_t bin_of_rank(const std::vector<int64_t>& counts, int64_t* wanted) {
  int64_t bin = 0;
  while (*wanted > counts[static_cast<size_t>(bin)]) *wanted -= counts[static_cast<size_t>(bin++)];
  return bin;
}

// Two passes of 16 bits each find the exact strength without sorting anything.
Cut global_cut(const Rewire& args, const Layout& l, int64_t wanted) {
  const int64_t high = bin_of_rank(histogram(args, l, [](uint32_t bits) { return int64_t{bits >> 16}; }), &wanted);
  const auto low_bin = [high](uint32_t bits) {
    return int64_t{bits >> 16} == high ? int64_t{bits & 0xFFFFu} : int64_t{-1};
  };
  const int64_t low = bin_of_rank(histogram(args, l, low_bin), &wanted);
  return {static_cast<uint32_t>(high << 16 | low), wanted};
}

// Ties of the cut before each task's rows.
std::vector<int64_t> ties_before(const Rewire& args, const Layout& l, const Cut& cut) {
  std::vector<int64_t> ties(static_cast<size_t>(l.tasks) + 1, 0);
  parallel_for(l.tasks, [&](int64_t task) {
    int64_t n = 0;
    for_rows(l, task, [&](int64_t r) {
      const Row row(args, r);
      for (int64_t k = 0; k < l.fan_in; ++k) n += row.strength(k) == cut.bits;
    });
    ties[static_cast<size_t>(task) + 1] = n;
  });
  std::partial_sum(ties.begin(), ties.end(), ties.begin());
  return ties;
}

// The cut within one row for the `wanted` weakest.
Cut row_cut(const Row& row, int64_t fan_in, int64_t wanted, std::vector<uint32_t>& strengths) {
  if (wanted == 0) return {};
  strengths.resize(static_cast<size_t>(fan_in));
  for (int64_t k = 0; k < fan_in; ++k) strengths[static_cast<size_t>(k)] = row.strength(k);
  const auto nth = strengths.begin() + (wanted - 1);
  std::nth_element(strengths.begin(), nth, strengths.end());
  const uint32_t bits = *nth;
  return {bits, wanted - std::count_if(strengths.begin(), strengths.end(), [&](uint32_t s) { return s < bits; })};
}

// n distinct inputs out of those that are not in the ascending list `taken`, uniform: ranks are drawn.
void draw_free(const RandomStream& random, std::uint64_t row, int64_t n, int64_t in_features,
               const std::vector<int64_t>& taken, std::vector<int64_t>& out) {
  const auto count = static_cast<int64_t>(taken.size());
  const Floyd floyd{random, row, n, in_features - count};
  std::unordered_set<int64_t> ranks;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t draw = floyd.draw(j);
    ranks.insert(ranks.insert(draw).second ? draw : floyd.top(j));
  }
  for (int64_t rank : ranks) out.push_back(free_number(taken.data(), count, rank));
}

// Moves the marked connections of one row; false where there is nowhere to move to.
bool move_row(const Rewire& args, int64_t r, const std::vector<char>& moved, int64_t n) {
  const Row row(args, r);
  const int64_t fan_in = args.weight.cols;
  if (fan_in == args.in_features) return false;
  // A connection should not come back to where it left; where inputs are too few for that, it may.
  const bool may_return = args.in_features - fan_in < n;
  std::vector<int64_t> taken, fresh;
  for (int64_t k = 0; k < fan_in; ++k)
    if (!may_return || !moved[static_cast<size_t>(k)]) taken.push_back(row.input(k));
  const RandomStream random{args.seed, Purpose::rewire, args.step};
  draw_free(random, static_cast<std::uint64_t>(args.first_row + r), n, args.in_features, taken, fresh);
  std::sort(fresh.begin(), fresh.end());
  std::vector<std::pair<int64_t, int64_t>> now;  // input, column of before
  auto next = fresh.begin();
  for (int64_t k = 0; k < fan_in; ++k) now.emplace_back(moved[static_cast<size_t>(k)] ? *next++ : row.input(k), k);
  std::sort(now.begin(), now.end());
  std::vector<int64_t> order;
  for (const auto& [input, from] : now) {
    row.set_input(static_cast<int64_t>(order.size()), input);
    order.push_back(from);
  }
  row.reorder(order, moved);
  return true;
}

void check_state(const char* name, const AnyMatrix& state, const Rewire& args, bool half) {
  if (!state) return;
  const Dtype real = half ? args.weight.dtype : real_of(args.weight.dtype);
  expect_shape(name, state, args.weight.rows, args.weight.cols);
  expect_dtype(name, state.dtype, state.dtype == real, name_of(real));
}

void check_args(const Rewire& args) {
  const Dtype w = args.weight.dtype;
  expect_dtype("weight", w, w == Dtype::f32 || w == Dtype::bf16 || w == Dtype::f64, "float32, bfloat16 or float64");
  expect_shape("weight", args.weight, args.weight.rows, args.weight.cols);
  check_index_type(args.index_dtype, args.in_features);
  if (args.group_size < 1) throw ShapeError("group_size: expected at least 1, got " + to_string(args.group_size));
  if (args.index_stride < args.weight.cols) throw ShapeError("index: rows overlap");
  if (args.in_features < args.weight.cols)
    throw ShapeError("in_features: expected at least the fan-in " + to_string(args.weight.cols) + ", got " +
                     to_string(args.in_features));
  check_option("fraction", args.fraction, args.fraction >= 0 && args.fraction <= 1, "a number in [0, 1]");
  check_option("threshold", args.threshold, args.threshold >= 0, "a number >= 0");
  if (args.first_row < 0) throw ShapeError("first_row: expected at least 0, got " + to_string(args.first_row));
  check_state("first", args.first, args, false);
  check_state("second", args.second, args, false);
  check_state("compensation", args.compensation, args, true);
}

int64_t rewire_on_cpu(const Rewire& args) {
  const Layout l = layout_of(args);
  if (l.rows == 0 || args.in_features == l.fan_in) return 0;
  const bool by_row = args.mode == RewireMode::magnitude_row;
  Cut cut;
  std::vector<int64_t> before(static_cast<size_t>(l.tasks) + 1, 0);
  if (args.mode == RewireMode::threshold) {
    cut.bits = float_bits(static_cast<float>(args.threshold));
  } else if (!by_row) {
    const int64_t wanted = fraction_of(args.fraction, l.rows * l.fan_in);
    if (wanted == 0) return 0;
    cut = global_cut(args, l, wanted);
    before = ties_before(args, l, cut);
  }
  const int64_t per_row = fraction_of(args.fraction, l.fan_in);
  std::vector<int64_t> moved_by(static_cast<size_t>(l.tasks), 0);
  parallel_for(l.tasks, [&](int64_t task) {
    int64_t ties = cut.ties - before[static_cast<size_t>(task)];
    std::vector<char> moved(static_cast<size_t>(l.fan_in));
    std::vector<uint32_t> strengths;
    for_rows(l, task, [&](int64_t r) {
      const Row row(args, r);
      Cut here = cut;
      if (by_row) {
        here = row_cut(row, l.fan_in, per_row, strengths);
        ties = here.ties;
      }
      int64_t n = 0;
      for (int64_t k = 0; k < l.fan_in; ++k) {
        const uint32_t s = row.strength(k);
        const bool goes = s < here.bits || (s == here.bits && ties > 0 && ties-- > 0);
        moved[static_cast<size_t>(k)] = goes;
        n += goes;
      }
      if (n > 0 && move_row(args, r, moved, n)) moved_by[static_cast<size_t>(task)] += n;
    });
  });
  return std::accumulate(moved_by.begin(), moved_by.end(), int64_t{0});
}

}  // namespace

const char* name_of(RewireMode mode) {
  switch (mode) {
    case RewireMode::magnitude_global: return "magnitude_global";
    case RewireMode::magnitude_row: return "magnitude_row";
    default: return "threshold";
  }
}

int64_t rewire(const Rewire& args) {
  check_args(args);
  if (args.device.kind == Device::Kind::cuda) return cuda::rewire(args), -1;
  const int64_t moved = rewire_on_cpu(args);
  if (args.moved) *args.moved = moved;
  return moved;
}

std::int64_t scratch_bytes(const Rewire& args) {
  if (args.device.kind != Device::Kind::cuda) return 0;
  check_args(args);
  return cuda::scratch_bytes(args);
}

}  // namespace widehead
