// bag.cc -- embedding bag: checks the arguments, transposes the batch, hands ranges to the kernels
#include "widehead/bag.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "widehead/error.h"
#include "widehead/parallel.h"

namespace widehead {
namespace {

using std::to_string;

template <class I>
void check_indices(const I* indices, std::int64_t n, std::int64_t rows) {
  for (std::int64_t e = 0; e < n; ++e)
    if (indices[e] < 0 || indices[e] >= rows)
      throw LabelError("input: feature " + to_string(indices[e]) + " at position " + to_string(e) +
                       " is out of range; the table has " + to_string(rows) + " rows");
}

void check_input(const BagInput& x, const ConstAnyMatrix& table) {
  expect_dtype("table", table.dtype,
               table.dtype == Dtype::f32 || table.dtype == Dtype::bf16 || table.dtype == Dtype::f64,
               "float32, bfloat16 or float64");
  if (table.rows >= INT32_MAX)
    throw ShapeError("table: expected fewer than 2^31 - 1 rows, got " + to_string(table.rows));
  if (x.rows < 0 || x.rows >= INT32_MAX)
    throw ShapeError("input: expected 0 to 2^31 - 2 rows, got " + to_string(x.rows));
  if (x.rows == 0) return;
  if (x.indptr[0] != 0) throw ShapeError("input: expected indptr[0] = 0, got " + to_string(x.indptr[0]));
  for (std::int64_t b = 0; b < x.rows; ++b)
    if (x.indptr[b + 1] < x.indptr[b]) throw ShapeError("input: indptr decreases after row " + to_string(b));
  if (x.nnz() > x.indices.size || x.nnz() >= INT32_MAX)
    throw ShapeError("input: expected at most " + to_string(std::min<std::int64_t>(x.indices.size, INT32_MAX - 1)) +
                     " entries, got indptr[rows] = " + to_string(x.nnz()));
  if (x.indices.dtype == Dtype::i64)
    check_indices(static_cast<const std::int64_t*>(x.indices.data), x.nnz(), table.rows);
  else if (x.indices.dtype == Dtype::i32)
    check_indices(static_cast<const std::int32_t*>(x.indices.data), x.nnz(), table.rows);
  else
    throw DtypeError(std::string("input: expected int32 or int64 indices, got ") + name_of(x.indices.dtype));
}

void check_scale(bool normalise, double scale) {
  check_option("scale", scale, !normalise || scale > 0.0, "a positive number");
}

// A matrix [B, d] of the type that goes with the table.
void check_result(const char* name, const ConstAnyMatrix& m, std::int64_t rows, const ConstAnyMatrix& table) {
  expect_shape(name, m, rows, table.cols);
  expect_dtype(name, m.dtype, m.dtype == real_of(table.dtype), name_of(real_of(table.dtype)));
}

void check_norms(const ConstAnyVector& norms, std::int64_t rows, const ConstAnyMatrix& table, bool required) {
  expect_size("norms", norms, rows, required);
  if (norms) expect_dtype("norms", norms.dtype, norms.dtype == real_of(table.dtype), name_of(real_of(table.dtype)));
}

// The batch by features: a stable radix sort of (feature, entry), so entries of a feature stay in order of example.
class Transposed {
 public:
  explicit Transposed(const BagInput& x, std::int64_t n_features) : n_(static_cast<std::size_t>(x.nnz())) {
    keys_.resize(n_), entries_.resize(n_), other_keys_.resize(n_), other_entries_.resize(n_), example_of_.resize(n_);
    for (std::int64_t b = 0; b < x.rows; ++b)
      std::fill(example_of_.begin() + x.indptr[b], example_of_.begin() + x.indptr[b + 1],
                static_cast<std::uint32_t>(b));
    for (std::size_t e = 0; e < n_; ++e) {
      keys_[e] = x.indices.dtype == Dtype::i64
                     ? static_cast<std::uint32_t>(static_cast<const std::int64_t*>(x.indices.data)[e])
                     : static_cast<std::uint32_t>(static_cast<const std::int32_t*>(x.indices.data)[e]);
      entries_[e] = static_cast<std::uint32_t>(e);
    }
    const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n_features - 1))));
    const int passes = (bits + 10) / 11, digit = (bits + passes - 1) / passes;
    for (int pass = 0; pass < passes; ++pass) sort_pass(pass * digit, digit);
    for (std::size_t e = 0; e < n_; ++e)
      if (e == 0 || keys_[e] != keys_[e - 1]) {
        features.push_back(keys_[e]);
        segments.push_back(static_cast<std::int64_t>(e));
      }
    segments.push_back(static_cast<std::int64_t>(n_));
    for (std::size_t e = 0; e < n_; ++e) other_keys_[e] = example_of_[entries_[e]];
    if (x.values) {
      values.resize(n_);
      for (std::size_t e = 0; e < n_; ++e) values[e] = x.values[entries_[e]];
    }
  }
  const std::uint32_t* examples() const { return other_keys_.data(); }

  std::vector<std::uint32_t> features;
  std::vector<std::int64_t> segments;
  std::vector<float> values;

 private:
  void sort_pass(int shift, int digit) {
    const std::size_t buckets = std::size_t{1} << digit;
    const std::size_t chunks = std::clamp<std::size_t>(n_ / 16384, 1, 16);
    const auto first = [&](std::size_t c) { return n_ * c / chunks; };
    const auto bucket = [&](std::uint32_t key) { return (key >> shift) & (buckets - 1); };
    std::vector<std::uint32_t> place(buckets * chunks);
    parallel_for(static_cast<std::int64_t>(chunks), [&](std::int64_t c) {
      std::uint32_t* count = place.data() + static_cast<std::size_t>(c) * buckets;
      for (std::size_t e = first(c); e < first(c + 1); ++e) ++count[bucket(keys_[e])];
    });
    std::uint32_t sum = 0;
    for (std::size_t k = 0; k < buckets; ++k)
      for (std::size_t c = 0; c < chunks; ++c) sum += std::exchange(place[c * buckets + k], sum);
    parallel_for(static_cast<std::int64_t>(chunks), [&](std::int64_t c) {
      std::uint32_t* next = place.data() + static_cast<std::size_t>(c) * buckets;
      for (std::size_t e = first(c); e < first(c + 1); ++e) {
        const std::uint32_t to = next[bucket(keys_[e])]++;
        other_keys_[to] = keys_[e];
        other_entries_[to] = entries_[e];
      }
    });
    keys_.swap(other_keys_);
    entries_.swap(other_entries_);
  }

  std::size_t n_;
  std::vector<std::uint32_t> keys_, entries_, other_keys_, other_entries_, example_of_;
};

constexpr std::int64_t kExamples = 16;  // a task: about a thousand rows of the table

template <class Body>
void over_examples(std::int64_t rows, const Body& body) {
  parallel_for((rows + kExamples - 1) / kExamples,
               [&](std::int64_t t) { body(t * kExamples, std::min(rows, (t + 1) * kExamples)); });
}

}  // namespace

void bag_forward(const BagForward& args) {
  const BagInput& x = args.input;
  check_input(x, args.table);
  check_scale(args.normalise, args.scale);
  check_result("out", args.out, x.rows, args.table);
  check_norms(args.norms, x.rows, args.table, false);
  const cpu::BagForwardPlan plan{x.indptr,   x.indices.data, x.indices.dtype == Dtype::i64,
                                 x.values,   args.table,     args.normalise,
                                 args.scale, args.out,       args.norms.data};
  over_examples(x.rows, [&](std::int64_t begin, std::int64_t end) { cpu::kernels().bag.forward(plan, begin, end); });
}

void bag_step(const BagStep& args) {
  const BagInput& x = args.input;
  if (args.update == nullptr) throw ShapeError("update: expected an optimiser's step, got none");
  const Update& update = *args.update;
  check_input(x, args.table);
  check_scale(args.normalise, args.scale);
  check_result("grad", args.grad, x.rows, args.table);
  if (args.normalise) {
    check_result("out", args.out, x.rows, args.table);
    check_norms(args.norms, x.rows, args.table, true);
  }
  if (update.momentum != 0.0 && update.optimizer == Optimizer::sgd)
    throw ShapeError("momentum: an embedding bag takes 0, for its rows come up now and then; got " +
                     to_string(update.momentum));
  check_update(args.table, {}, update);
  check_finite(args.grad, "grad");
  if (x.nnz() == 0) return;
  if (x.values) check_finite(ConstAnyVector(x.values, x.nnz()), "input");

  const std::int64_t d = args.table.cols;
  std::vector<double> sums;  // also holds float32
  ConstAnyMatrix grad = args.grad;
  if (args.normalise) {
    sums.resize(static_cast<std::size_t>(x.rows * d * size_of(grad.dtype) + 7) / 8);
    const cpu::BagGradientPlan plan{args.out, args.norms.data, args.scale, args.grad, sums.data()};
    over_examples(x.rows, [&](std::int64_t begin, std::int64_t end) { cpu::kernels().bag.gradient(plan, begin, end); });
    grad = {sums.data(), grad.dtype, x.rows, d, d};
  }
  const Transposed batch(x, args.table.rows);
  const auto touched = static_cast<std::int64_t>(batch.features.size());
  const cpu::BagStepPlan plan{batch.segments.data(),
                              batch.features.data(),
                              batch.examples(),
                              x.values ? batch.values.data() : nullptr,
                              touched,
                              args.table,
                              grad,
                              &update};
  // Tasks of about as many entries each, cut between features.
  const std::int64_t tasks = std::clamp<std::int64_t>(x.nnz() / 512, 1, 4096);
  const auto cut = [&](std::int64_t t) {
    return std::lower_bound(batch.segments.begin(), batch.segments.end() - 1, x.nnz() * t / tasks) -
           batch.segments.begin();
  };
  parallel_for(tasks, [&](std::int64_t t) {
    std::vector<double> scratch(static_cast<std::size_t>(d));
    cpu::kernels().bag.step(plan, cut(t), cut(t + 1), scratch.data());
  });
}

}  // namespace widehead
