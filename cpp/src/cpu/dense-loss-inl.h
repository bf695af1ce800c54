// dense-loss-inl.h -- losses and their derivatives on one panel of logits, Z [classes][PW]
#pragma once
#include "cpu/dense-tile-inl.h"
#include "cpu/math-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

template <class Real>
WIDEHEAD_INLINE Real class_weight(const DenseContext& ctx, i64 c) {
  return ctx.loss.class_weight ? static_cast<Real>(ctx.loss.class_weight[c]) : Real{1};
}

// Calls f(entry, its logit slot, lane) for the targets of the tile that lie in examples [b0, b0 + PW).
template <class M, class F>
WIDEHEAD_INLINE void for_entries(const Tile<M>& t, i64 b0, F f) {
  for (i64 e = 0; e < t.n_entries; ++e) {
    const i64 lane = t.entries[e].row - b0;
    if (lane >= 0 && lane < Tile<M>::kP) f(t.entries[e], t.entry_logits[e], lane);
  }
}

// Adds the bias, applies the soft cap, adds the offset: the weight of a sampled class is not to be capped. Targets keep
// their logit without the offset.
template <class M>
void finish_logits(const DenseContext& ctx, const Tile<M>& t, i64 b0, typename M::Real* z, int vectors) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const Real cap = static_cast<Real>(ctx.loss.softcap);
  if (ctx.offset)
    for_entries<M>(t, b0, [&](const Entry& e, Real& logit, i64 lane) {
      logit = z[(e.cls - t.first) * kP + lane] + t.bias[e.cls - t.first];
      if (cap > 0) logit = cap * static_cast<Real>(__builtin_tanh(static_cast<double>(logit / cap)));
    });
  if (cap > 0) {
    for (i64 c = 0; c < t.count; ++c)
      for (int v = 0; v < vectors; ++v) {
        const Vec<Real> capped = tanh((load(z + c * kP + v * kLanes) + t.bias[c]) / cap) * cap;
        store(z + c * kP + v * kLanes, ctx.offset ? capped + static_cast<Real>(ctx.offset[t.first + c]) : capped);
      }
  } else if (ctx.bias || ctx.offset) {
    for (i64 c = 0; c < t.count; ++c)
      for (int v = 0; v < vectors; ++v) store(z + c * kP + v * kLanes, load(z + c * kP + v * kLanes) + t.add[c]);
  }
  for_entries<M>(t, b0, [&](const Entry& e, Real& logit, i64 lane) {
    Real& zi = z[(e.cls - t.first) * kP + lane];
    if (ctx.offset) zi = logit;
    logit = zi;
  });
}

// total += part with the rounding error kept in lost. An infinite sum has none: its error would be NaN.
template <class V>
WIDEHEAD_INLINE void kahan_add(V& total, V& lost, V part) {
  const V y = part - lost;
  const V next = total + y;
  lost = next - next == V{} ? (next - total) - y : V{};
  total = next;
}

template <class M>
struct PartialView {
  using Real = typename M::Real;
  Real *row_max, *row_sum, *row_lost, *row_aux, *row_aux_lost;
  PartialView(const ForwardPartial& p, i64 b0)
      : row_max(static_cast<Real*>(p.row_max) + b0),
        row_sum(static_cast<Real*>(p.row_sum) + b0),
        row_lost(static_cast<Real*>(p.row_lost) + b0),
        row_aux(static_cast<Real*>(p.row_aux) + b0),
        row_aux_lost(static_cast<Real*>(p.row_aux_lost) + b0) {}
};

// Online log-sum-exp: one rescaling a tile, compensated sums across tiles.
template <class M>
void accumulate_lse(const Tile<M>& t, const typename M::Real* z, int vectors, PartialView<M> p) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  for (int v = 0; v < vectors; ++v) {
    const Real* zv = z + v * kLanes;
    const Vec<Real> old = load(p.row_max + v * kLanes);
    Vec<Real> top = old;
    for (i64 c = 0; c < t.count; ++c) top = max(load(zv + c * kP), top);
    Vec<Real> even{}, odd{};
    i64 c = 0;
    for (; c + 1 < t.count; c += 2) {
      even += exp(load(zv + c * kP) - top);
      odd += exp(load(zv + (c + 1) * kP) - top);
    }
    if (c < t.count) even += exp(load(zv + c * kP) - top);
    const Vec<Real> scale = exp(old - top);
    Vec<Real> total = load(p.row_sum + v * kLanes) * scale, lost = load(p.row_lost + v * kLanes) * scale;
    kahan_add(total, lost, even + odd);
    store(p.row_max + v * kLanes, top);
    store(p.row_sum + v * kLanes, total);
    store(p.row_lost + v * kLanes, lost);
  }
}

template <class M, class F>
void accumulate_aux(const DenseContext& ctx, const Tile<M>& t, const typename M::Real* z, int vectors, PartialView<M> p,
                    F term) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  for (int v = 0; v < vectors; ++v) {
    Vec<Real> part{};
    for (i64 c = 0; c < t.count; ++c)
      part += term(load(z + c * kP + v * kLanes)) * class_weight<Real>(ctx, t.first + c);
    Vec<Real> total = load(p.row_aux + v * kLanes), lost = load(p.row_aux_lost + v * kLanes);
    kahan_add(total, lost, part);
    store(p.row_aux + v * kLanes, total);
    store(p.row_aux_lost + v * kLanes, lost);
  }
}

WIDEHEAD_INLINE double hinge(double z) { return z > 0 ? z * z : z == z ? 0 : z; }

// Losses of the panel into the partial results.
template <class M>
void accumulate_losses(const DenseContext& ctx, const Tile<M>& t, i64 b0, const typename M::Real* z, int vectors,
                       const ForwardPartial& partial) {
  using Real = typename M::Real;
  const PartialView<M> p(partial, b0);
  const Loss kind = ctx.loss.kind;
  if (kind == Loss::softmax) {
    accumulate_lse<M>(t, z, vectors, p);
    if (ctx.loss.label_smoothing > 0) accumulate_aux<M>(ctx, t, z, vectors, p, [](Vec<Real> x) { return x; });
  } else if (kind == Loss::bce) {
    accumulate_aux<M>(ctx, t, z, vectors, p,
                      [](Vec<Real> x) { return max(x, Vec<Real>{}) + log1p(exp(-abs<Real>(x))); });
  } else {
    accumulate_aux<M>(ctx, t, z, vectors, p, [](Vec<Real> x) {
      const Vec<Real> y = x + Real{1};
      return y < Real{0} ? Vec<Real>{} : y * y;
    });
  }
  for_entries<M>(t, b0, [&](const Entry& e, Real logit, i64) {
    const double zt = static_cast<double>(logit), y = e.value, w = class_weight<double>(ctx, e.cls);
    partial.output[e.row] += y * zt;
    partial.adjust[e.row] += kind == Loss::squared_hinge ? w * (y * hinge(1 - zt) - hinge(1 + zt))
                             : kind == Loss::bce         ? -w * y * zt
                                                         : w * y * zt;
  });
}

// dL/dz of the classes as if nothing were a target, in place. `scale` is p_scale, `even` is e_scale, both at b0.
template <class M>
void gradient_panel(const DenseContext& ctx, const Tile<M>& t, i64 b0, typename M::Real* z, int vectors) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const Loss kind = ctx.loss.kind;
  const Real cap = static_cast<Real>(ctx.loss.softcap);
  const bool smooth = ctx.loss.label_smoothing > 0, weighted = ctx.loss.class_weight != nullptr;
  for (int v = 0; v < vectors; ++v) {
    const Vec<Real> scale = load(static_cast<const Real*>(ctx.p_scale) + b0 + v * kLanes);
    Real* zv = z + v * kLanes;
    if (kind == Loss::softmax) {
      const Vec<Real> lse = load(static_cast<const Real*>(ctx.lse) + b0 + v * kLanes);
      const Vec<Real> even = load(static_cast<const Real*>(ctx.e_scale) + b0 + v * kLanes);
      for (i64 c = 0; c < t.count; ++c) {
        const Vec<Real> x = load(zv + c * kP);
        Vec<Real> g = exp(x - lse) * scale;
        if (smooth) g -= even * class_weight<Real>(ctx, t.first + c);
        if (cap > 0) {
          // Where an offset is minus infinity the gradient is 0, and the clamp keeps it from becoming NaN.
          const Vec<Real> own = ctx.offset ? x - static_cast<Real>(ctx.offset[t.first + c]) : x;
          const Vec<Real> r = max(min(own / cap, splat(Real{1})), splat(Real{-1}));
          g = g * (Real{1} - r * r);
        }
        store(zv + c * kP, g);
      }
    } else {
      for (i64 c = 0; c < t.count; ++c) {
        const Vec<Real> x = load(zv + c * kP);
        Vec<Real> g;
        if (kind == Loss::bce) {
          const Vec<Real> e = exp(-abs<Real>(x));
          g = (x < Real{0} ? e : e * Real{0} + Real{1}) / (e + Real{1}) * scale;
        } else {
          const Vec<Real> y = x + Real{1};
          g = (y < Real{0} ? Vec<Real>{} : y) * scale * Real{2};
        }
        if (weighted) g = g * class_weight<Real>(ctx, t.first + c);
        store(zv + c * kP, g);
      }
    }
  }
}

// Adds what the targets change in dL/dz.
template <class M>
void gradient_entries(const DenseContext& ctx, const Tile<M>& t, i64 b0, typename M::Real* g) {
  using Real = typename M::Real;
  const double cap = ctx.loss.softcap;
  for_entries<M>(t, b0, [&](const Entry& e, Real logit, i64 lane) {
    const double z = static_cast<double>(logit), y = e.value, w = class_weight<double>(ctx, e.cls);
    const double loss = ctx.grad_losses[e.row], output = ctx.grad_output[e.row];
    double change = output * y;
    Real& slot = g[(e.cls - t.first) * Tile<M>::kP + lane];
    if (ctx.loss.kind == Loss::softmax) {
      change -= loss * (1 - ctx.loss.label_smoothing) * y * w;
      if (cap > 0) {
        const double slope = 1 - (z / cap) * (z / cap);
        change *= slope;
        // The panel took this logit for one with an offset.
        if (ctx.offset)
          slot = static_cast<Real>(__builtin_exp(z - static_cast<double>(static_cast<const Real*>(ctx.lse)[e.row])) *
                                   slope) *
                 static_cast<const Real*>(ctx.p_scale)[e.row];
      }
    } else if (ctx.loss.kind == Loss::bce) {
      change -= loss * w * y;
    } else {
      change -= 2 * loss * w * (y * (z < 1 ? 1 - z : 0) + (z > -1 ? 1 + z : 0));
    }
    slot += static_cast<Real>(change);
  });
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
