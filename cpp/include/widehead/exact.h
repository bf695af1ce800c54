// exact.h -- exact SGD on a full layer of D outputs in O(d^2) a step, for losses of the spherical family
//
// A loss of the family is a function of the outputs A at an example's targets, of q = |o|^2 and of s = sum o, where
// o = W h are all D outputs (Vincent, de Brebisson, Bouthillier, "Efficient exact gradient update for training deep
// networks with very large sparse targets", NIPS 2015, arXiv 1412.7091; arXiv 1606.08061). Its gradient changes every row of
// W, but all rows that are no targets by the same d x d matrix, and so W is kept as the product of rows and such matrices:
// q and s come from W'W and W'1, and no step ever walks all D rows.
#pragma once
#include <cstdint>
#include <memory>

#include "widehead/labels.h"
#include "widehead/view.h"

namespace widehead {

// squared_error      q - 2 sum y A + sum y^2, y the values of the targets
// spherical_softmax  log(q + D eps) - log(A^2 + eps)
// taylor_softmax     log(D + s + q / 2) - log(1 + A + A^2 / 2)
// z_loss             softplus(a (b - z)) / a, z = (A - mu) / sigma with the mean and deviation of all outputs (arXiv 1604.08859)
// The last three are sums over the targets, each times its value.
enum class SphericalLoss : std::uint8_t { squared_error, spherical_softmax, taylor_softmax, z_loss };
const char* name_of(SphericalLoss loss);

struct SphericalOptions {
  SphericalLoss kind = SphericalLoss::squared_error;
  double eps = 1e-2;  // spherical_softmax
  double a = 1.0;     // z_loss
  double b = 10.0;    // z_loss
};

// Losses [B], and their derivatives by A [nnz], q [B] and s [B]; each output may be null. Throws ShapeError for options out of
// their range, LabelError for targets. Single-label targets that are `ignore_index` (-1 here: none) do not exist: give CSR rows, empty ones for nothing.
void spherical_loss(const SphericalOptions& options, const Labels& target, const double* A, const double* q,
                    const double* s, double* losses, double* grad_A, double* grad_q, double* grad_s);

// blocked   rows of the targets take plain steps for a block of steps, all others one matrix a block; no inverse
// woodbury  the published one: rows V_j U + omega with U and its inverse for an epoch; no momentum
enum class ExactMethod : std::uint8_t { blocked, woodbury };
const char* name_of(ExactMethod method);

struct ExactOptions {
  ExactMethod method = ExactMethod::blocked;
  bool wide = false;             // factors and the rows of a block in float64 beside float32 rows
  std::int64_t block_steps = 4;  // blocked: steps after which the rows of a block go back to the store
  std::int64_t radix = 8;        // of the merge of block matrices, at most
  double max_kappa = 4.0;        // woodbury: an epoch ends before U or its inverse could pass it
};

struct ExactStep {
  double lr = 0.0;
  double weight_decay = 0.0;             // coupled, as torch.optim.SGD
  double momentum = 0.0;                 // heavy ball, as torch.optim.SGD without dampening; needs velocities
  const double* column_scale = nullptr;  // [d] factors of the gradient's columns, or null
};

struct ExactDiagnostics {
  std::int64_t steps, blocks, matrices, hot_rows, fetched, row_products;
  std::int64_t listed;  // entries in the lists of rows by label; at most 2 a class
  std::int64_t
      plain_steps;      // woodbury: steps beyond max_kappa on their own, which took the rows of their targets plainly
  double gram_error;    // max |Q p - W'(W p)| / |Q p| for a probe p; streams all rows
  double weight_norm2;  // |W|^2, of Q
  double kappa;         // woodbury: bounds the singular values of U and of its inverse
};

class ExactCore;

// What a forward pass keeps for its backward pass.
class ExactBatch;

// W [D, d] lies in the caller's memory, float32 or float64, and stays there: between calls of consolidate() it holds a factor of W,
// not W. So do the velocities of momentum. One thread at a time.
class ExactHead {
 public:
  // Throws ShapeError, DtypeError, and NonFiniteError for a weight that is not finite.
  ExactHead(AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options);
  ~ExactHead();
  ExactHead(ExactHead&&) noexcept;
  ExactHead& operator=(ExactHead&&) noexcept;

  // A [nnz], q [B] and s [B]. `train`: the rows of the targets are made ready for a step, and what comes back is for backward().
  // They stay apart, and take memory, until a step or consolidate(): to evaluate, leave `train` out.
  // Throws NonFiniteError, LabelError, ShapeError and DtypeError before anything changes.
  std::shared_ptr<ExactBatch> forward(const ConstAnyMatrix& hidden, const Labels& target, bool train, double* A,
                                      double* q, double* s);
  // Adds the batch's gradient to the next step's, and writes dL/dH [B, d] where it is asked for. The weights do not change. A batch
  // can go in several times, as gradients add up; one that was not made with `train` only gives dL/dH.
  void backward(const ExactBatch& batch, const double* grad_A, const double* grad_q, const double* grad_s,
                AnyMatrix grad_hidden);
  // Of the gradient so far: |dL/dW|^2, and the mean square of each of its columns [d].
  double grad_norm2() const;
  void grad_columns(double* mean_squares) const;
  void scale_grad(double factor);
  void zero_grad();
  std::int64_t pending() const;  // examples of the gradient so far
  // One SGD step by the gradient so far, which is then gone. Throws before anything changes.
  void step(const ExactStep& step);

  // Rows of W as they are now.
  void rows(const std::int64_t* ids, std::int64_t n, AnyMatrix out) const;
  // Rewrites the caller's memory so that it holds W (and the velocities); one pass over it.
  void consolidate();
  // Recomputes W'W and W'1 from the rows: after the caller has written to a consolidated W. Batches of before are stale.
  // Throws ShapeError while a gradient waits for its step.
  void refresh();
  ExactDiagnostics diagnostics() const;

 private:
  std::unique_ptr<ExactCore> core_;
};

}  // namespace widehead
