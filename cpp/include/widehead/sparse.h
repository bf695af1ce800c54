// sparse.h -- the balanced sparse output layer: every class has the same small number K of inputs
//
//   z[b, c] = bias[c] + sum_k weight[c, k] hidden[b, index[c, k]]
//
// Schultheis & Babbar, "Towards memory-efficient training for extremely large output spaces", ECML-PKDD 2023
// (arXiv 2306.03725). With group_size G the classes of a group, G in a row, share their inputs. Classes are walked in tiles
// that stay in cache, and a fused step updates the weights of a tile there; no matrix of logits exists. Losses, targets,
// gradients that come in, errors and the rules of a GPU are those of dense.h. Results are the same bits for any number
// of threads, and on a GPU every time.
#pragma once
#include <cstdint>

#include "widehead/dense.h"

namespace widehead {

// index[g, k] in [0, H), ascending within a row: the inputs of the classes of group g. With H <= 65536 they can be uint16.
struct SparseIndex {
  const void* data = nullptr;  // [ceil(D / group_size), K] uint16 | int32
  Dtype dtype = Dtype::u16;
  std::int64_t stride = 0;  // of a row, at least K
  std::int64_t group_size = 1;
};

struct SparseLayer {
  ConstAnyMatrix hidden = {};  // [B, H] float32 | bfloat16 | float16 | float64 (with float64 weights)
  ConstAnyMatrix weight = {};  // [D, K] float32 | bfloat16 | float64
  SparseIndex index = {};
  ConstAnyVector bias = {};  // [D] or empty; float32 | bfloat16 | float64
};

// Throws ShapeError naming the first row of the index that is out of range or does not ascend. The operations below take
// the index as checked: whoever makes or loads one calls this once. On a GPU a bad row is recorded and sets *refused.
void check_index(const SparseIndex& index, std::int64_t groups, std::int64_t fan_in, std::int64_t in_features,
                 const Device& device = {});

// See DenseForward. Softmax takes no soft cap here.
struct SparseForward {
  SparseLayer layer = {};
  Labels target = {};
  LossOptions loss = {};
  AnyVector losses = {};  // [B]
  AnyVector output = {};  // [B]
  AnyVector lse = {};     // [B] softmax only
  Device device = {};
};
void sparse_forward(const SparseForward& args);
// Bytes of device.scratch that the call wants; see DenseForward.
std::int64_t scratch_bytes(const SparseForward& args);

// See DenseBackward. grad_weight is [D, K], and so is the state of an update.
struct SparseBackward {
  SparseLayer layer = {};
  Labels target = {};
  LossOptions loss = {};
  ConstAnyVector lse = {};
  ConstAnyVector grad_losses = {};
  ConstAnyVector grad_output = {};
  ConstAnyVector grad_lse = {};
  AnyMatrix grad_hidden = {};  // [B, H] or empty
  AnyMatrix grad_weight = {};  // [D, K] or empty
  AnyVector grad_bias = {};    // [D] or empty
  const Update* update = nullptr;
  AnyVector losses = {};
  AnyVector output = {};
  Device device = {};
};
void sparse_backward(const SparseBackward& args);
std::int64_t scratch_bytes(const SparseBackward& args);

struct SparseLogits {
  SparseLayer layer = {};
  AnyMatrix logits = {};  // [B, D] float32 | float64
  Device device = {};
};
void sparse_logits(const SparseLogits& args);
std::int64_t scratch_bytes(const SparseLogits& args);

struct SparseScores {
  SparseLayer layer = {};
  const std::int64_t* classes = nullptr;  // [B, n]
  std::int64_t n = 0;
  AnyMatrix scores = {};  // [B, n] float32 | float64
  Device device = {};
};
void sparse_scores(const SparseScores& args);
std::int64_t scratch_bytes(const SparseScores& args);

// See DenseTopK.
struct SparseTopK {
  SparseLayer layer = {};
  std::int64_t k = 1;
  const std::int64_t* exclude_indptr = nullptr;
  const std::int64_t* exclude_indices = nullptr;
  std::int64_t exclude_size = 0;
  AnyMatrix scores = {};              // [B, k]
  Matrix<std::int64_t> classes = {};  // [B, k]
  AnyVector lse = {};                 // [B] or empty
  Device device = {};
};
void sparse_topk(const SparseTopK& args);
std::int64_t scratch_bytes(const SparseTopK& args);

// Fills the index with K distinct inputs a row, ascending, uniform among all such sets: a function of (seed, row) alone,
// so that classes added later, and shards, have the rows of the whole. O(K log K) a row. Throws ShapeError for K > H.
void draw_index(void* index, Dtype dtype, std::int64_t stride, std::int64_t groups, std::int64_t fan_in,
                std::int64_t in_features, std::uint64_t seed, std::int64_t first_row, const Device& device = {});

}  // namespace widehead
