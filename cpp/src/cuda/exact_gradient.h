// exact_gradient.h -- the gradient of a batch by the outputs of its targets, and what a step needs of it
#pragma once
#include "cuda/exact_state.h"

namespace widehead::cuda {

template <class Factor>
struct GradientScratch {
  StepPlan* plan;
  double *grad_A, *grad_q, *grad_s;  // scaled
  double* ones;                      // S'1 [m]
  double* drift;                     // S of a row that is omega [m]
  Factor* by_output;                 // S of the distinct rows [nnz, m]
  Factor* products;                  // S'S [m, m], up to rounding symmetric

  GradientScratch(i64 examples, i64 targets, Scratch& scratch) {
    plan = scratch.take<StepPlan>(1);
    grad_A = scratch.take<double>(targets);
    grad_q = scratch.take<double>(examples);
    grad_s = scratch.take<double>(examples);
    ones = scratch.take<double>(examples);
    drift = scratch.take<double>(examples);
    by_output = scratch.take<Factor>(targets * examples);
    products = scratch.take<Factor>(examples * examples);
  }
};

// Of exact_gradient.cu. Fills all but the plan; `directions`: also B [m, width] of the step, with factors of its
// columns or null.
template <class Row, class Factor>
void gradient_products(const Device& device, const ExactView<Row, Factor>& head, const BatchView<Factor>& batch,
                       const GradientScratch<Factor>& s, Factor* directions, const double* column_scale);

}  // namespace widehead::cuda
