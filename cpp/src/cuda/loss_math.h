// loss_math.h -- the arithmetic of the losses on one logit, and the merging of sums; host tests run it too
#pragma once
#include <math.h>

#include <cstdint>

#include "widehead/loss.h"
#include "widehead/random.h"

namespace widehead::cuda {

// exp by the precise routine; kernels of 16-bit weights have a faster one.
WIDEHEAD_HD inline float exp_of(float x) { return ::expf(x); }
WIDEHEAD_HD inline double exp_of(double x) { return ::exp(x); }
WIDEHEAD_HD inline float log1p_of(float x) { return ::log1pf(x); }
WIDEHEAD_HD inline double log1p_of(double x) { return ::log1p(x); }
WIDEHEAD_HD inline float tanh_of(float x) { return ::tanhf(x); }
WIDEHEAD_HD inline double tanh_of(double x) { return ::tanh(x); }

template <class Real>
WIDEHEAD_HD inline Real larger(Real a, Real b) {
  return a > b ? a : b;
}

// The sum of exp(z) over some classes, as sum * exp(max). Milakov & Gimelshein, arXiv 1805.02867.
template <class Real>
struct LogSum {
  Real max;
  Real sum;
};
// Below every finite logit, and such that differences to itself are 0 and not NaN.
template <class Real>
WIDEHEAD_HD inline LogSum<Real> empty_sum() {
  return {sizeof(Real) == 4 ? static_cast<Real>(-3.4028234663852886e38) : static_cast<Real>(-1.7976931348623157e308),
          0};
}
template <class Real>
WIDEHEAD_HD inline LogSum<Real> merged(LogSum<Real> a, LogSum<Real> b) {
  const Real top = larger(a.max, b.max);
  return {top, a.sum * exp_of(a.max - top) + b.sum * exp_of(b.max - top)};
}

// total += part with the rounding error kept in lost (Kahan). An infinite sum has none: its error would be NaN.
template <class Real>
WIDEHEAD_HD inline void kahan_add(Real& total, Real& lost, Real part) {
  const Real y = part - lost, next = total + y;
  lost = next - next == 0 ? (next - total) - y : Real{0};
  total = next;
}

template <class Real>
WIDEHEAD_HD inline Real capped(Real z, Real cap) {
  return cap > 0 ? cap * tanh_of(z / cap) : z;
}
// d capped / dz, from the capped logit.
template <class Real>
WIDEHEAD_HD inline Real cap_slope(Real z, Real cap) {
  if (!(cap > 0)) return 1;
  const Real r = z / cap;
  return r * r < 1 ? 1 - r * r : r * r >= 1 ? Real{0} : r;
}

// The loss of a class that is no target, for losses that are sums over classes.
template <Loss kKind, class Real>
WIDEHEAD_HD inline Real class_loss(Real z) {
  if (kKind == Loss::bce) return larger(z, Real{0}) + log1p_of(exp_of(z < 0 ? z : -z));
  const Real y = z + 1;
  return y < 0 ? Real{0} : y * y;
}

// max(0, x)^2; NaN stays.
WIDEHEAD_HD inline double hinge(double x) { return x > 0 ? x * x : x == x ? 0 : x; }

// What a target of weight y adds to the loss of its example: with softmax, to the sum that is taken off the lse.
template <Loss kKind>
WIDEHEAD_HD inline double target_loss(double z, double y, double class_weight) {
  switch (kKind) {
    case Loss::squared_hinge: return class_weight * (y * hinge(1 - z) - hinge(1 + z));
    case Loss::bce: return -class_weight * y * z;
    default: return class_weight * y * z;
  }
}

// dL/dz of a class as if it were no target; softmax: of p = exp(z - lse).
template <Loss kKind, class Real>
WIDEHEAD_HD inline Real class_gradient(Real z, Real p, Real scale, Real even, Real class_weight) {
  if (kKind == Loss::softmax) return p * scale - even * class_weight;
  if (kKind == Loss::bce) {
    const Real e = exp_of(z < 0 ? z : -z);
    return (z < 0 ? e : Real{1}) / (1 + e) * scale * class_weight;
  }
  const Real y = z + 1;
  return (y < 0 ? Real{0} : y) * scale * 2 * class_weight;
}

// What being a target of weight y changes in dL/dz. `loss` and `output` are the gradients that come in.
template <Loss kKind, class Real>
WIDEHEAD_HD inline Real target_gradient(Real z, Real y, Real class_weight, Real loss, Real output, Real smoothing) {
  const Real own = output * y;
  if (kKind == Loss::softmax) return own - loss * (1 - smoothing) * y * class_weight;
  if (kKind == Loss::bce) return own - loss * class_weight * y;
  return own - 2 * loss * class_weight * (y * (z < 1 ? 1 - z : Real{0}) + (z > -1 ? 1 + z : Real{0}));
}

}  // namespace widehead::cuda
