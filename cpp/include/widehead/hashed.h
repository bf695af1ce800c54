// hashed.h -- softmax cross-entropy over the classes that a batch's examples look at, each example its own
//
// An example's classes are the candidates that a HashIndex has found, its targets, and the classes of `negatives`, drawn uniformly
// for the whole batch. Only their rows of the weights are read and changed (Vijayanarasimhan, Shlens, Monga, Yagnik, arXiv
// 1412.7479).
#pragma once
#include <cstdint>
#include <memory>

#include "widehead/labels.h"
#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead {

// The normaliser Z = sum over all N classes of exp(z_c), estimated from those that are seen. S: candidates and targets.
// restricted  sum over all that are seen: what is never retrieved is never pushed down
// corrected   sum over S + (N - |S|) / n sum over the n draws that fell outside S: unbiased, as those are uniform in the rest
// importance  sum over all that are seen of exp(z_c) / q_c, q_c the odds that c is seen: 1 of a target, else 1 - (1 - u)(1 - h) with
//             u = 1 - (1 - 1 / N)^n of the draws and h = 1 - (1 - k / L)^L of a candidate that met the query in k of L
//             tables (0 of others): k / L stands for the collision probability
enum class Estimator : std::uint8_t { restricted, corrected, importance };
const char* name_of(Estimator estimator);

struct HashedForward {
  ConstAnyMatrix hidden = {};  // [B, d] any floating type
  ConstAnyMatrix weight = {};  // [N, d] float32 | bfloat16 | float64
  ConstAnyVector bias = {};    // [N] of the weights' type, or empty
  Labels target = {};          // [B]
  std::int64_t ignore_index = -100;
  Estimator estimator = Estimator::corrected;
  const std::int64_t* candidates = nullptr;  // [B, n_candidates] in [0, N), distinct in a row; -1: none
  const std::int32_t* counts = nullptr;      // [B, n_candidates] for `importance`
  std::int64_t n_candidates = 0;
  int tables = 1;                           // for `importance`
  const std::int64_t* negatives = nullptr;  // [n_negatives] in [0, N)
  std::int64_t n_negatives = 0;
  double* losses = nullptr;  // [B] sum over targets of y (lse - z); 0 without targets
  double* lse = nullptr;     // [B] log Z; 0 for an example without targets, which looks at no class
  double* output = nullptr;  // [B] sum over targets of y (z - lse); or null
};

// What a forward pass keeps: which example looks at which class, sorted by class, and the logits.
class HashedBatch {
 public:
  virtual ~HashedBatch() = default;
  virtual std::int64_t examples() const = 0;
  virtual std::int64_t pairs() const = 0;               // of an example and a class
  virtual std::int64_t rows() const = 0;                // distinct classes
  virtual void copy_rows(std::int64_t* out) const = 0;  // [rows()] ascending
};

// Throws ShapeError, DtypeError, LabelError, NonFiniteError (hidden). Same bits for any number of threads.
std::shared_ptr<HashedBatch> hashed_forward(const HashedForward& args);

// Rows that have moved far since they were hashed.
struct Drift {
  float* sums = nullptr;  // [N] lengths of the steps since then, over the length of the row; steps add to it
  double limit = 0.03;
  std::int64_t* moved = nullptr;  // [>= batch rows] rows whose sum has passed the limit in this call, ascending
  std::int64_t n_moved = 0;       // written
};

struct HashedBackward {
  const HashedBatch* batch = nullptr;
  const double* grad_losses = nullptr;  // [B]
  AnyMatrix weight = {};                // as in the forward pass; written where there is an update
  AnyVector bias = {};
  AnyMatrix grad_hidden = {};      // [B, d] any floating type, or empty
  const Update* update = nullptr;  // one step of the optimiser on each of the batch's rows
  Drift* drift = nullptr;          // with an update
  AnyMatrix grad_rows = {};        // [rows, d] float32 | float64, the gradient of the batch's rows; or empty
  AnyVector grad_bias = {};        // [rows]
};
// Throws before any change: ShapeError, DtypeError, NonFiniteError (grad_losses; a logit or lse that is not finite).
void hashed_backward(const HashedBackward& args);

}  // namespace widehead
