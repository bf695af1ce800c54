// exact_core.h -- what a method of the exact head does for the class that users see
#pragma once
#include <vector>

#include "cpu/exact_matrix.h"
#include "widehead/exact.h"

namespace widehead {

// What a forward pass keeps; a method adds its own.
class ExactBatch {
 public:
  std::vector<cpu::i64> indptr, ids;  // the targets
  cpu::i64 steps = 0;                 // of the head when this was made
  cpu::i64 base = 0;                  // of the rows: how often they had been brought together
  bool train = false;
  std::vector<cpu::i64> unique;  // the targets in ascending order, where the method keeps their rows with the batch

  cpu::i64 examples() const { return static_cast<cpu::i64>(indptr.size()) - 1; }
  void set_targets(const Labels& target) {
    indptr.resize(static_cast<std::size_t>(target.rows) + 1);
    const cpu::i64 start = target.indptr ? target.indptr[0] : 0;
    for (cpu::i64 i = 0; i <= target.rows; ++i)
      indptr[static_cast<std::size_t>(i)] = target.indptr ? target.indptr[i] - start : i;
    ids.assign(target.indices + start, target.indices + start + indptr.back());
  }
};

namespace cpu {
// With the batch, H times W'W, and rows of its targets.
template <class Real>
class KeptBatch final : public ExactBatch {
 public:
  Dense<Real> hidden, hidden_squares, rows;  // [m, d], [m, width], [unique, width]
};
}  // namespace cpu

class ExactCore {
 public:
  virtual ~ExactCore() = default;
  virtual std::shared_ptr<ExactBatch> forward(const ConstAnyMatrix& hidden, const Labels& target, bool train, double* A,
                                              double* q, double* s) = 0;
  virtual void backward(const ExactBatch& batch, const double* grad_A, const double* grad_q, const double* grad_s,
                        AnyMatrix grad_hidden) = 0;
  virtual double grad_norm2() const = 0;
  virtual void grad_columns(double* mean_squares) const = 0;
  virtual void scale_grad(double factor) = 0;
  virtual void zero_grad() = 0;
  virtual std::int64_t pending() const = 0;
  virtual void step(const ExactStep& step) = 0;
  virtual void rows(const std::int64_t* ids, std::int64_t n, AnyMatrix out) const = 0;
  virtual void consolidate() = 0;
  virtual void refresh() = 0;
  virtual ExactDiagnostics diagnostics() const = 0;

  std::int64_t classes = 0, features = 0;
  bool momentum = false;
};

namespace cpu {
std::unique_ptr<ExactCore> make_exact(AnyMatrix weight, AnyMatrix velocity, const ExactOptions& options);
}
}  // namespace widehead
