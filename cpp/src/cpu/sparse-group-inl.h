// sparse-group-inl.h -- the sparse head with inputs shared by groups of classes: small dense products
//
// The inputs of a group are gathered once, [K][PW] for a panel of examples; from there on a group is a dense layer of G classes
// and K features, and its three products go through the micro-kernel of the dense head.
#pragma once
#include "cpu/sparse-row-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// Scratch of one task; `panels` of PW inputs each.
template <class M>
struct Groups {
  using Real = typename M::Real;
  static constexpr i64 kP = Tile<M>::kP;
  i64 size, padded, panels;  // classes of a group; the same as the micro-kernel wants it
  int32_t* inputs;           // [K]
  Real* weight;              // [groups of the tile][panel][padded][PW]
  Real* x;                   // [K padded][PW examples]
  Real* xt;                  // [panel][PW examples][PW inputs]
  Real* dx;                  // [K padded][PW examples]
  Real* dw;                  // [groups of the tile][panel][padded][PW]

  i64 group_elements() const { return panels * padded * kP; }
};

template <class M>
Groups<M> carve_groups(const DenseContext& ctx, const DenseGeometry& geometry, Carve& carve) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP;
  Groups<M> g{};
  g.size = ctx.group_size;
  g.padded = round_up(ctx.group_size, kRowStep);
  g.panels = ceil_div(ctx.fan_in, kP);
  const i64 count = geometry.tile / ctx.group_size, wide = g.panels * kP;
  g.inputs = carve.take<int32_t>(wide);
  g.weight = carve.take<Real>(count * g.group_elements());
  g.x = carve.take<Real>(wide * kP);
  g.xt = carve.take<Real>(wide * kP);
  g.dx = carve.take<Real>(wide * kP);
  g.dw = carve.take<Real>(count * g.group_elements());
  return g;
}

template <class M>
std::size_t groups_bytes(const DenseContext& ctx, const DenseGeometry& geometry) {
  Carve carve{nullptr};
  carve_groups<M>(ctx, geometry, carve);
  return reinterpret_cast<std::size_t>(carve.p);
}

// Packs the weights of the tile's groups.
template <class M>
void pack_groups(const DenseContext& ctx, const Tile<M>& t, Groups<M>& g) {
  constexpr i64 kP = Tile<M>::kP;
  for (i64 c = 0; c < round_up(t.count, g.size); ++c) {
    typename M::Real* out = g.weight + c / g.size * g.group_elements() + c % g.size * kP;
    const auto* w = static_cast<const typename M::Weight*>(ctx.weight) + (t.first + c) * ctx.weight_stride;
    for (i64 p = 0; p < g.panels; ++p, out += g.padded * kP)
      if (c < t.count) {
        copy_panel<M>(w + p * kP, out, at_most(kP, ctx.fan_in - p * kP));
      } else {
        __builtin_memset(out, 0, sizeof(typename M::Real) * kP);
      }
  }
}

template <class M>
void read_group(const DenseContext& ctx, i64 group, Groups<M>& g) {
  const i64 at = group * ctx.index_stride;
  if (ctx.index_dtype == Dtype::u16) {
    for (i64 k = 0; k < ctx.fan_in; ++k) g.inputs[k] = static_cast<const uint16_t*>(ctx.index)[at + k];
  } else {
    for (i64 k = 0; k < ctx.fan_in; ++k) g.inputs[k] = static_cast<const int32_t*>(ctx.index)[at + k];
  }
}

template <class M>
WIDEHEAD_INLINE void gather_inputs(const DenseContext& ctx, Groups<M>& g, i64 panel) {
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const Input<M>* x = panel_inputs<M>(ctx, panel);
  for (i64 k = 0; k < ctx.fan_in; ++k) {
    store(g.x + k * kP, load_input(x + g.inputs[k] * kP));
    store(g.x + k * kP + kLanes, load_input(x + g.inputs[k] * kP + kLanes));
  }
}

// Z panel of the tile, group by group. Rows of padding fall on the next group's place, which is filled after, or on slack.
template <class M>
void group_logits(const DenseContext& ctx, const Tile<M>& t, Groups<M>& g, i64 panel, typename M::Real* z,
                  int vectors) {
  constexpr i64 kP = Tile<M>::kP;
  Prefetch none;
  for (i64 c = 0; c < t.count; c += g.size) {
    read_group<M>(ctx, (t.first + c) / g.size, g);
    gather_inputs<M>(ctx, g, panel);
    gemm_panel<M, Order::rows>(g.weight + c / g.size * g.group_elements(), g.padded * kP, g.padded, g.x, ctx.fan_in,
                               z + c * kP, false, vectors, none);
  }
}

// A square of kLanes vectors, transposed by perfect shuffles.
template <class Real>
WIDEHEAD_INLINE void transpose(Vec<Real>* v) {
  constexpr int kLanes = Simd<Real>::kLanes;
  typedef typename Simd<Real>::I I;
  I lower{}, upper{};
  for (int i = 0; i < kLanes; ++i) {
    lower[i] = static_cast<decltype(I{}[0] + 0)>(i / 2 + (i % 2) * kLanes);
    upper[i] = lower[i] + kLanes / 2;
  }
#pragma GCC unroll 8
  for (int step = 1; step < kLanes; step *= 2) {
    Vec<Real> w[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      w[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], lower);
      w[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], upper);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  }
}

// xt from x; what x has past the fan-in are numbers of no account, but numbers.
template <class M>
void transpose_inputs(const Groups<M>& g) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  for (i64 p = 0; p < g.panels; ++p)
    for (i64 i = 0; i < kP; i += kLanes)
      for (i64 lane = 0; lane < kP; lane += kLanes) {
        Vec<Real> square[kLanes];
        for (i64 j = 0; j < kLanes; ++j) square[j] = load(g.x + (p * kP + i + j) * kP + lane);
        transpose<Real>(square);
        for (i64 j = 0; j < kLanes; ++j) store(g.xt + (p * kP + lane + j) * kP + i, square[j]);
      }
}

// dX of the group's inputs, and dW of its classes, for one panel; `z` has the gradients of the tile's classes.
template <class M>
void group_gradient(const DenseContext& ctx, const Tile<M>& t, Groups<M>& g, i64 c, i64 panel,
                    const typename M::Real* z, typename M::Real* grad_hidden, bool want_weight) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  Prefetch none;
  const Real* gradients = z + c * kP;
  const i64 classes = at_most(g.size, t.count - c), at = c / g.size * g.group_elements();
  read_group<M>(ctx, (t.first + c) / g.size, g);
  if (want_weight) {
    gather_inputs<M>(ctx, g, panel);
    transpose_inputs<M>(g);
    for (i64 p = 0; p < g.panels; ++p)
      gemm_panel<M, Order::rows>(gradients, 0, round_up(classes, kRowStep), g.xt + p * kP * kP,
                                 at_most(kP, ctx.batch - panel * kP), g.dw + at + p * g.padded * kP, panel > 0, 2,
                                 none);
  }
  if (!grad_hidden) return;
  for (i64 p = 0; p < g.panels; ++p)
    gemm_panel<M, Order::columns>(g.weight + at + p * g.padded * kP, 0,
                                  round_up(at_most(kP, ctx.fan_in - p * kP), kRowStep), gradients, classes,
                                  g.dx + p * kP * kP, false, 2, none);
  Real* dx = grad_hidden + panel * ctx.features * kP;
  for (i64 k = 0; k < ctx.fan_in; ++k) {
    Real* to = dx + g.inputs[k] * kP;
    store(to, load(to) + load(g.dx + k * kP));
    store(to + kLanes, load(to + kLanes) + load(g.dx + k * kP + kLanes));
  }
}

// Row c of the tile's dW.
template <class M>
WIDEHEAD_INLINE void read_group_grad(const DenseContext& ctx, const Groups<M>& g, i64 c, typename M::Real* out) {
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const typename M::Real* row = g.dw + c / g.size * g.group_elements() + c % g.size * kP;
  for (i64 p = 0; p * kP < ctx.fan_in; ++p)
    for (int v = 0; v < 2; ++v) store(out + p * kP + v * kLanes, load(row + p * g.padded * kP + v * kLanes));
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
