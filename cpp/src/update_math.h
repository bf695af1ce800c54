// update_math.h -- the arithmetic of an optimiser step on one weight, for the CPU and the GPU
#pragma once
#include <math.h>

#include "widehead/random.h"
#include "widehead/update.h"

namespace widehead {

// Numbers of the step that do not depend on the element.
template <class Real>
struct UpdateScalars {
  Real lr, momentum, decay, beta1, beta2, rest1, rest2, keep, step_size, inverse_bias2, eps;

  UpdateScalars() = default;
  WIDEHEAD_HD explicit UpdateScalars(const Update& u) : UpdateScalars(u, u.lr, static_cast<double>(u.step)) {}
  WIDEHEAD_HD UpdateScalars(const Update& u, double lr_, double step)
      : lr(static_cast<Real>(lr_)),
        momentum(static_cast<Real>(u.momentum)),
        decay(static_cast<Real>(u.weight_decay)),
        beta1(static_cast<Real>(u.beta1)),
        beta2(static_cast<Real>(u.beta2)),
        // 1 - 0.999 in float32 is off by 1e-5, which the bias correction, exact, would not undo.
        rest1(static_cast<Real>(1.0 - u.beta1)),
        rest2(static_cast<Real>(1.0 - u.beta2)),
        keep(static_cast<Real>(1.0 - lr_ * u.weight_decay)),
        step_size(static_cast<Real>(lr_ * bias_correction(u, u.beta1, step))),
        inverse_bias2(static_cast<Real>(bias_correction(u, u.beta2, step))),
        eps(static_cast<Real>(u.eps)) {}

  // The power costs as much as a short row, so only Adam pays for it.
  WIDEHEAD_HD static double bias_correction(const Update& u, double beta, double step) {
    return u.optimizer == Optimizer::adam ? 1.0 / (1.0 - ::pow(beta, step)) : 1.0;
  }
};

// The weight after the step, before rounding. m and v are the element's moments.
template <class Real>
WIDEHEAD_HD inline Real stepped(const UpdateScalars<Real>& s, Optimizer kind, Real w, Real g, Real* m, Real* v,
                                Real row_scale) {
  if (kind == Optimizer::sgd) {
    g += s.decay * w;
    if (m) g = *m = s.momentum * *m + g;
    return w - s.lr * g;
  }
  if (kind == Optimizer::adam) {
    *m = s.beta1 * *m + s.rest1 * g;
    *v = s.beta2 * *v + s.rest2 * g * g;
    const Real root = sizeof(Real) == 4 ? static_cast<Real>(::sqrtf(static_cast<float>(*v * s.inverse_bias2)))
                                        : static_cast<Real>(::sqrt(static_cast<double>(*v * s.inverse_bias2)));
    return w * s.keep - s.step_size * *m / (root + s.eps);
  }
  return w * s.keep - row_scale * g;
}

}  // namespace widehead
