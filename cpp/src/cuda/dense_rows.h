// dense_rows.h -- what the kernels of the dense head know of each example: its targets, its incoming gradients, its sums
#pragma once
#include "cuda/fault.h"
#include "cuda/launch.h"
#include "widehead/dense.h"

namespace widehead::cuda {

enum class RowState : std::int32_t { active, ignored, bad };

// Targets of one example: indices[begin .. end) of all classes, none for an ignored or a bad one, so that kernels may trust them.
struct RowTargets {
  i64 begin, end;
  double total, weighted;  // sum of the targets' weights; the same times the classes' weights
  RowState state;
  bool part;  // the layer holds some of the classes: losses are its share, see ranges.h
};

// dL/dz = p scale - even + (for targets) terms of loss and output.
template <class Real>
struct alignas(16) RowGradient {
  Real lse, scale, even, loss, output;
};

// Sums over the classes that one warp has seen of an example; see DenseForward.
template <class Real>
struct RowSums {
  Real max, sum, lost, aux, aux_lost;
  double output, adjust;
};

// Layer and loss as kernels take them.
template <class Real>
struct Problem {
  ConstAnyVector bias;
  const float* offset;
  const float* class_weight;  // of the layer's classes
  Real softcap, smoothing;
  const i64* indices;  // of all classes; the layer's begin with first_class
  const float* values;
  i64 first_class;

  Problem(const DenseLayer& layer, const Labels& target, const LossOptions& loss)
      : bias(layer.bias),
        offset(layer.offset),
        class_weight(loss.class_weight ? loss.class_weight + target.first_class : nullptr),
        softcap(static_cast<Real>(loss.softcap)),
        smoothing(static_cast<Real>(loss.label_smoothing)),
        indices(target.indices),
        values(target.values),
        first_class(target.first_class) {}
};

// Checks the labels and fills rows [B]. Bad ones are reported.
void prepare_targets(const Device& device, const Labels& target, const LossOptions& loss, const Report& report,
                     RowTargets* rows);

// Sum of the class weights into *sum; `parts` has kSumParts elements. D without weights.
constexpr i64 kSumParts = 256;
void sum_class_weights(const Device& device, const float* class_weight, i64 classes, double* parts, double* sum);

// Fills out [B]. `strict`: reports what is not finite, or would not be in the weights' type. *largest becomes the largest |grad_losses|.
template <class Real>
void prepare_gradients(const DenseBackward& args, const RowTargets* rows, const double* class_weight_sum, bool strict,
                       const Report& report, RowGradient<Real>* out, float* largest);

// Reports the first row of a matrix with a NaN or an infinity.
void check_finite(const Device& device, const ConstAnyMatrix& m, Argument argument, const Report& report);

template <class Real>
void clear_sums(const Device& device, RowSums<Real>* sums, i64 n);

// Losses, outputs and lse of every example from sums [B, slots].
template <class Real>
void finish_losses(const Device& device, const LossOptions& loss, i64 batch, i64 classes, const RowTargets* rows,
                   const double* class_weight_sum, const RowSums<Real>* sums, int slots, AnyVector losses,
                   AnyVector output, AnyVector lse);

// out[c] = sum of parts[., c] over `blocks` rows of `stride`.
template <class Real>
void sum_columns(const Device& device, const Real* parts, i64 blocks, i64 stride, i64 count, Real* out);

}  // namespace widehead::cuda
