// dense.h -- the exact output layer, fused: losses, gradients and updates without ever storing the logits
//
//   z = W h + b,  loss_i = lse(z_i) - z_{i, y_i},  dH = (p - y) W,  dW = (p - y)^T H
//
// Classes are walked in tiles that stay in cache. The softmax normaliser is online (Milakov & Gimelshein, arXiv 1805.02867);
// the fused layout follows "Cut Your Losses" (arXiv 2411.09009), with the update applied to a tile while it is in cache.
// No entry changes anything before all its arguments are checked. Results are the same bits for any number of threads.
//
// On a GPU a call enqueues its work on device.stream and returns: it never waits, and CUDA graphs can capture it. Shapes
// and data types are refused at once; bad values (labels out of range, NaN where a fused step would take it) are
// recorded in device.faults, the losses of their rows are NaN, and gradients and steps of that call change nothing.
#pragma once
#include <cstdint>

#include "widehead/labels.h"
#include "widehead/loss.h"
#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead {

// What every operation of the head reads. Arithmetic: float64 weights in float64; float32 weights in float32; bfloat16
// weights by products of bfloat16 (hidden is rounded to it) accumulated in float32; float16 weights (GPU) likewise.
struct DenseLayer {
  ConstAnyMatrix hidden = {};  // [B, d] float32 | bfloat16 | float16 | float64 (with float64 weights)
  ConstAnyMatrix weight = {};  // [D, d] float32 | bfloat16 | float64, on a GPU also float16
  ConstAnyVector bias = {};    // [D] or empty; float32 | bfloat16 | float64
  // [D] or null: added to a class's logit except where it is the example's own target. The log-weight of a sampled
  // class; -infinity: the class serves its own examples only.
  const float* offset = nullptr;
  bool tf32 = false;  // GPU: products of float32 may round their factors to TF32, as torch's allow_tf32
};

// Losses of a batch. Per-example outputs are float32 (float64 with float64 weights); any of them may be left out.
struct DenseForward {
  DenseLayer layer = {};
  Labels target = {};
  LossOptions loss = {};
  AnyVector losses = {};  // [B] loss of each example, before any reduction; 0 where ignored. Of a part: see ranges.h
  AnyVector output = {};  // [B] softmax: log-probability of the target, sum_j y_j (z_j - lse); others: sum_j y_j z_j
  AnyVector lse = {};     // [B] log-sum-exp of the logits, softmax only; DenseBackward wants it
  Device device = {};
};
void dense_forward(const DenseForward& args);
// Bytes of device.scratch that the call wants; 0 on the CPU. Looks at shapes, data types and options only.
std::int64_t scratch_bytes(const DenseForward& args);

// Gradients, and with `update` the optimiser's step on weight and bias.
// The objective is sum_i grad_loss_i loss_i + grad_output_i output_i + grad_lse_i lse_i.
struct DenseBackward {
  DenseLayer layer = {};
  Labels target = {};
  LossOptions loss = {};
  ConstAnyVector lse = {};          // [B] from dense_forward, of all classes; softmax only
  ConstAnyVector grad_losses = {};  // [B]
  ConstAnyVector grad_output = {};  // [B] or empty
  ConstAnyVector grad_lse = {};     // [B] or empty
  AnyMatrix grad_hidden = {};       // [B, d] any floating dtype, or empty; overwritten
  AnyMatrix grad_weight = {};       // [D, d] float32 | bfloat16 | float64, or empty; overwritten
  AnyVector grad_bias = {};         // [D], or empty
  // Fused: the step is applied to layer.weight and layer.bias, which must then be writable, and to the state in *update.
  const Update* update = nullptr;
  // bce and hinge need one pass: with these given, the losses of DenseForward are computed on the way.
  AnyVector losses = {};
  AnyVector output = {};
  // Softmax gradient filtering: a tile in which every |dL/dz| stays below filter_eps * max_i |grad_losses_i| is skipped.
  // Each skipped entry is in error by less than that. 0: off. *filtered counts the skipped tiles.
  double filter_eps = 0.0;
  std::int64_t* filtered = nullptr;  // on a GPU in its memory, and added to
  Device device = {};
};
// With `update`, throws NonFiniteError before any change when hidden, lse or a gradient that comes in is NaN or infinite
// (on a GPU: hidden in the weights' type, in which a large number may be); without it such numbers go into the gradients,
// as in torch.
void dense_backward(const DenseBackward& args);
std::int64_t scratch_bytes(const DenseBackward& args);

// logits [B, D]; for callers who want all of them.
struct DenseLogits {
  DenseLayer layer = {};
  double softcap = 0.0;
  AnyMatrix logits = {};  // [B, D] float32 | float64
  Device device = {};
};
void dense_logits(const DenseLogits& args);
std::int64_t scratch_bytes(const DenseLogits& args);

// scores[b, j] = logit of class classes[b, j].
struct DenseScores {
  DenseLayer layer = {};
  double softcap = 0.0;
  const std::int64_t* classes = nullptr;  // [B, n]
  std::int64_t n = 0;
  AnyMatrix scores = {};  // [B, n] float32 | float64
  Device device = {};
};
void dense_scores(const DenseScores& args);
std::int64_t scratch_bytes(const DenseScores& args);

// The k best classes, best first; equal scores in order of class. A class whose logit is -infinity (a masked one) or NaN
// is never among them. Rows with fewer than k classes left end with score -infinity and class -1.
struct DenseTopK {
  DenseLayer layer = {};
  double softcap = 0.0;
  std::int64_t k = 1;
  const std::int64_t* exclude_indptr = nullptr;   // [B + 1] or null: classes that must not appear, CSR; any numbers
  const std::int64_t* exclude_indices = nullptr;  // [nnz]
  std::int64_t exclude_size = 0;                  // nnz; for a GPU, which checks the row pointers against it
  AnyMatrix scores = {};                          // [B, k] float32 | float64
  Matrix<std::int64_t> classes = {};              // [B, k]
  AnyVector lse = {};                             // [B] or empty: filled with the log-sum-exp of all logits
  Device device = {};
};
void dense_topk(const DenseTopK& args);
std::int64_t scratch_bytes(const DenseTopK& args);

}  // namespace widehead
