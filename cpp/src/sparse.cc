// sparse.cc -- checks the arguments of the sparse head once, then picks the backend; draws its inputs
#include "widehead/sparse.h"

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "cpu/backend.h"
#include "cuda/backend.h"
#include "head_check.h"
#include "rewire_math.h"
#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead {
namespace {

using std::int64_t;
using std::to_string;

template <class Args>
void check_layer(const Args& args) {
  const SparseLayer& l = args.layer;
  check_layer(l, l.hidden.cols, args.device);
  expect_dtype("weight", l.weight.dtype, l.weight.dtype != Dtype::f16, "float32, bfloat16 or float64");
  if (l.index.group_size < 1) throw ShapeError("group_size: expected at least 1, got " + to_string(l.index.group_size));
  if (!l.index.data) throw ShapeError("index: expected the inputs of the classes, got none");
  check_index_type(l.index.dtype, l.hidden.cols);
  if (l.hidden.rows > 0 && l.weight.cols > l.hidden.cols)
    throw ShapeError("weight: expected at most " + to_string(l.hidden.cols) +
                     " inputs a class, as hidden has features, got " + to_string(l.weight.cols));
  if (l.index.stride < l.weight.cols)
    throw ShapeError("index: rows overlap: stride " + to_string(l.index.stride) + " is below " +
                     to_string(l.weight.cols) + " inputs");
}

int64_t entry(const SparseIndex& index, int64_t row, int64_t k) {
  const int64_t at = row * index.stride + k;
  return index.dtype == Dtype::u16 ? static_cast<const std::uint16_t*>(index.data)[at]
                                   : static_cast<const std::int32_t*>(index.data)[at];
}

void refuse_softcap(const LossOptions& loss) {
  if (loss.softcap > 0) throw ShapeError("softcap: is not for the sparse head");
}

void draw_row(const Floyd& floyd, std::vector<int64_t>& out, std::unordered_set<int64_t>& taken) {
  out.clear();
  taken.clear();
  for (int64_t j = 0; j < floyd.n; ++j) {
    const int64_t draw = floyd.draw(j);
    const int64_t pick = taken.insert(draw).second ? draw : floyd.top(j);
    taken.insert(pick);
    out.push_back(pick);
  }
  std::sort(out.begin(), out.end());
}

}  // namespace

void check_index(const SparseIndex& index, int64_t groups, int64_t fan_in, int64_t in_features, const Device& device) {
  check_index_type(index.dtype, in_features);
  if (on_gpu(device)) return cuda::check_index(index, groups, fan_in, in_features, device);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < fan_in; ++k) {
      const int64_t input = entry(index, g, k);
      if (input < 0 || input >= in_features)
        throw ShapeError("index: expected inputs in [0, " + to_string(in_features) + "), got " + to_string(input) +
                         " at row " + to_string(g) + ", column " + to_string(k));
      if (k > 0 && entry(index, g, k - 1) >= input)
        throw ShapeError("index: expected distinct inputs in ascending order, got " +
                         to_string(entry(index, g, k - 1)) + " before " + to_string(input) + " in row " + to_string(g));
    }
}

void sparse_forward(const SparseForward& args) {
  check_layer(args);
  check_forward(args);
  refuse_softcap(args.loss);
  if (on_gpu(args.device)) return cuda::sparse_forward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.layer.hidden.rows > 0) cpu::sparse_forward(args);
}

void sparse_backward(const SparseBackward& args) {
  check_layer(args);
  check_backward(args);
  refuse_softcap(args.loss);
  if (on_gpu(args.device)) return cuda::sparse_backward(args);
  check_labels(args.target, args.loss.ignore_index, "target");
  if (args.update) check_finite_step(args);
  cpu::sparse_backward(args);
}

void sparse_logits(const SparseLogits& args) {
  check_layer(args);
  expect_scores("logits", args.logits, args.layer, args.layer.weight.rows);
  if (on_gpu(args.device)) return cuda::sparse_logits(args);
  if (args.layer.hidden.rows > 0) cpu::sparse_logits(args);
}

void sparse_scores(const SparseScores& args) {
  check_layer(args);
  expect_scores("scores", args.scores, args.layer, args.n);
  if (on_gpu(args.device)) return cuda::sparse_scores(args);
  check_classes(args);
  if (args.layer.hidden.rows > 0 && args.n > 0) cpu::sparse_scores(args);
}

void sparse_topk(const SparseTopK& args) {
  check_layer(args);
  check_topk(args);
  if (on_gpu(args.device)) return cuda::sparse_topk(args);
  check_exclude(args);
  if (args.layer.hidden.rows > 0) cpu::sparse_topk(args);
}

int64_t scratch_bytes(const SparseForward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
int64_t scratch_bytes(const SparseBackward& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
int64_t scratch_bytes(const SparseLogits& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
int64_t scratch_bytes(const SparseScores& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }
int64_t scratch_bytes(const SparseTopK& args) { return on_gpu(args.device) ? cuda::scratch_bytes(args) : 0; }

void draw_index(void* index, Dtype dtype, int64_t stride, int64_t groups, int64_t fan_in, int64_t in_features,
                std::uint64_t seed, int64_t first_row, const Device& device) {
  check_index_type(dtype, in_features);
  if (fan_in < 1 || fan_in > in_features)
    throw ShapeError("fan_in: expected 1 to " + to_string(in_features) + " inputs a class, got " + to_string(fan_in));
  if (first_row < 0) throw ShapeError("first_row: expected at least 0, got " + to_string(first_row));
  if (on_gpu(device))
    return cuda::draw_index(index, dtype, stride, groups, fan_in, in_features, seed, first_row, device);
  const RandomStream random{seed, Purpose::rewire, 0};
  constexpr int64_t kRows = 256;
  parallel_for((groups + kRows - 1) / kRows, [&](int64_t chunk) {
    std::vector<int64_t> row;
    std::unordered_set<int64_t> taken;
    for (int64_t g = chunk * kRows; g < std::min(groups, (chunk + 1) * kRows); ++g) {
      draw_row({random, static_cast<std::uint64_t>(first_row + g), fan_in, in_features}, row, taken);
      for (int64_t k = 0; k < fan_in; ++k) {
        if (dtype == Dtype::u16) {
          static_cast<std::uint16_t*>(index)[g * stride + k] =
              static_cast<std::uint16_t>(row[static_cast<std::size_t>(k)]);
        } else {
          static_cast<std::int32_t*>(index)[g * stride + k] =
              static_cast<std::int32_t>(row[static_cast<std::size_t>(k)]);
        }
      }
    }
  });
}

}  // namespace widehead
