// exact_loss.cc -- losses of a batch from its statistics
#include "exact_loss.h"

#include <limits>

#include "exact_check.h"

namespace widehead {

const char* name_of(SphericalLoss loss) {
  switch (loss) {
    case SphericalLoss::squared_error: return "squared_error";
    case SphericalLoss::spherical_softmax: return "spherical_softmax";
    case SphericalLoss::taylor_softmax: return "taylor_softmax";
    default: return "z_loss";
  }
}

void spherical_loss(const SphericalOptions& options, const Labels& target, const double* A, const double* q,
                    const double* s, double* losses, double* grad_A, double* grad_q, double* grad_s) {
  check_spherical(options);
  check_labels(target, std::numeric_limits<std::int64_t>::min(), "target");
  for (std::int64_t i = 0; i < target.rows; ++i) {
    SphericalRow row{q[i], s[i], static_cast<double>(target.n_classes)};
    const std::int64_t begin = target.indptr ? target.indptr[i] : i, end = target.indptr ? target.indptr[i + 1] : i + 1;
    for (std::int64_t j = begin; j < end; ++j) {
      const double by_A = row.add(options, A[j], target.values ? static_cast<double>(target.values[j]) : 1.0);
      if (grad_A) grad_A[j] = by_A;
    }
    row.finish(options);
    if (losses) losses[i] = row.value;
    if (grad_q) grad_q[i] = row.grad_q;
    if (grad_s) grad_s[i] = row.grad_s;
  }
}

}  // namespace widehead
