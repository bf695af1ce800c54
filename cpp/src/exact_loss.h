// exact_loss.h -- the losses of the spherical family and their derivatives, for the CPU and the GPU
#pragma once
#include <math.h>

#include "widehead/exact.h"
#include "widehead/random.h"

namespace widehead {

// What one example's loss needs besides its targets.
struct SphericalRow {
  double q, s, classes;
  double value = 0, grad_q = 0, grad_s = 0;

  // Adds a target with output A and value y; returns dl/dA.
  WIDEHEAD_HD double add(const SphericalOptions& o, double A, double y) {
    switch (o.kind) {
      case SphericalLoss::squared_error: value += y * y - 2 * y * A; return -2 * y;
      case SphericalLoss::spherical_softmax: {
        const double norm = q + classes * o.eps, own = A * A + o.eps;
        value += y * (::log(norm) - ::log(own));
        grad_q += y / norm;
        return -2 * y * A / own;
      }
      case SphericalLoss::taylor_softmax: {
        const double norm = classes + s + q / 2, own = 1 + A + A * A / 2;
        value += y * (::log(norm) - ::log(own));
        grad_q += y / (2 * norm);
        grad_s += y / norm;
        return -y * (1 + A) / own;
      }
      default: {
        const double mean = s / classes, variance = q / classes - mean * mean, deviation = ::sqrt(variance);
        const double z = (A - mean) / deviation, x = o.a * (o.b - z);
        const double tail = ::exp(-::fabs(x));
        value += y * ((x > 0 ? x : 0) + ::log1p(tail)) / o.a;
        const double by_z = -y * (x > 0 ? 1 : tail) / (1 + tail);
        grad_q -= by_z * z / (2 * variance * classes);
        grad_s += by_z * (z * mean / variance - 1 / deviation) / classes;
        return by_z / deviation;
      }
    }
  }
  // After the targets.
  WIDEHEAD_HD void finish(const SphericalOptions& o) {
    if (o.kind != SphericalLoss::squared_error) return;
    value += q;
    grad_q = 1;
  }
};

}  // namespace widehead
