// dense_fused.h -- the dense head for narrow layers (d <= 128, 16-bit weights): no logit ever leaves the registers
//
// Three kernels: sums of exp over the classes; dX with the examples held and the classes streaming by; dW and the
// optimiser's step with the classes held and the examples streaming by. The last two recompute the logits, so a step takes
// five products and three exponentials an entry where tiles through cuBLAS take four and two; but at d = 64 the tiles'
// traffic with the L2 cache costs several times the products.
#pragma once
#include "cuda/dense_rows.h"

namespace widehead::cuda {

// 16-bit weights of at most 128 features in rows of whole 16-byte pieces; one target an example; float32 bias or none; no
// soft cap, offset or class weights; any optimiser but adagrad.
bool fused_fits(const DenseLayer& layer, const Labels& target, const LossOptions& loss, const Update* update,
                const Device& device);

// With a Scratch that only counts, they count.
void fused_forward(const DenseForward& args, Scratch& scratch);
void fused_backward(const DenseBackward& args, Scratch& scratch);

// An example as the gradient's kernels want it; the padding of a batch has scale, even, change, loss and output of 0.
struct alignas(16) FusedRow {
  float lse2;  // lse in base 2
  float scale, even;
  float change;  // softmax: what the target adds
  float loss, output;
  i64 target;  // -1: none
};
static_assert(sizeof(FusedRow) == 32);

template <class W>
struct FusedProblem {
  Loss loss;
  const W* x;
  const W* w;
  i64 batch, classes, x_stride, w_stride;
  int features;
  const float* bias;
  float smoothing;
};

// sums [batch, parts]: max, sum, lost, aux, aux_lost are set.
template <class W>
void fused_sums(const Device& device, const FusedProblem<W>& p, int parts, RowSums<float>* sums);

// Of `filter_bound`: entries of a patch of 16 or 32 by 32 that are all below it count as 0.
struct FusedFilter {
  const float* largest;
  float eps;  // 0: off
  i64* filtered;
};

// partial [parts, batch, features]: dX of each part of the classes.
template <class W>
void fused_grad_hidden(const Device& device, const FusedProblem<W>& p, const FusedRow* rows, int parts,
                       const FusedFilter& filter, float* partial);

// dW of classes [first, first + count): to grad_weight, or the optimiser's step. grad_bias [count] or null.
struct FusedWeightTask {
  i64 first, count;
  AnyMatrix grad_weight;
  const Update* update;
  const void* scalars;  // UpdateScalars<float>
  const std::int32_t* refused;
  float* grad_bias;
};
template <class W>
void fused_grad_weight(const Device& device, const FusedProblem<W>& p, const FusedRow* rows, const FusedFilter& filter,
                       const FusedWeightTask& task);

}  // namespace widehead::cuda
