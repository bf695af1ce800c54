// sparse-row-inl.h -- the sparse head's products over the few inputs of one class
//
// Hidden lies feature-major, [batch panel][feature][PW], so that one input of a class is two whole vectors for a panel of examples:
// contiguous loads from a place that is random by the row only. Z, G and the losses are the dense head's, on tiles of classes.
#pragma once
#include "cpu/dense-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// One class's inputs and weights, where they lie if they lie there as numbers of the arithmetic.
template <class M, class Index>
struct SparseRow {
  const Index* inputs;             // [K]
  const typename M::Real* weight;  // [K]
  typename M::Real* wide;          // [K] room for weights that must be widened
};

template <class M, class Index>
SparseRow<M, Index> carve_row(const DenseContext& ctx, Carve& carve) {
  SparseRow<M, Index> r{};
  r.wide = carve.take<typename M::Real>(round_up(ctx.fan_in, Tile<M>::kP));
  return r;
}

template <class M, class Index>
WIDEHEAD_INLINE void read_row(const DenseContext& ctx, i64 cls, SparseRow<M, Index>& r) {
  const i64 group = ctx.group_size == 1 ? cls : cls / ctx.group_size;
  r.inputs = static_cast<const Index*>(ctx.index) + group * ctx.index_stride;
  const auto* w = static_cast<const typename M::Weight*>(ctx.weight) + cls * ctx.weight_stride;
  if constexpr (sizeof(typename M::Weight) == 2) {
    widen(w, r.wide, ctx.fan_in);
    r.weight = r.wide;
  } else {
    r.weight = w;
  }
}

// How hidden lies in memory: beside bfloat16 weights it is rounded to bfloat16 anyway, and half the bytes are half the
// cache lines, which bound the products.
template <class M, bool kHalf = sizeof(typename M::Weight) == 2>
struct InputOf {
  using type = typename M::Real;
};
template <class M>
struct InputOf<M, true> {
  using type = uint16_t;
};
template <class M>
using Input = typename InputOf<M>::type;

template <class Real>
WIDEHEAD_INLINE Vec<Real> load_input(const Real* x) {
  return load(x);
}
WIDEHEAD_INLINE Vec<float> load_input(const uint16_t* x) { return load_bf16(x); }

// The inputs of one panel of examples, [feature][PW].
template <class M>
WIDEHEAD_INLINE const Input<M>* panel_inputs(const DenseContext& ctx, i64 panel) {
  return static_cast<const Input<M>*>(ctx.packed_columns) + panel * ctx.features * Tile<M>::kP;
}

// Packs the examples of one block.
template <class M>
void pack_inputs(const DenseContext& ctx, i64 block) {
  constexpr i64 kP = Tile<M>::kP, kBlock = Shape<M>::kBlock;
  using Real = typename M::Real;
  auto* row = static_cast<Real*>(__builtin_malloc(static_cast<std::size_t>(ctx.features) * sizeof(Real)));
  for (i64 b = block * kBlock; b < at_most((block + 1) * kBlock, round_up(ctx.batch, kP)); ++b) {
    auto* out = static_cast<Input<M>*>(ctx.packed_columns) + b / kP * ctx.features * kP + b % kP;
    if (b < ctx.batch) read_hidden<M>(ctx, b, row);
    for (i64 k = 0; k < ctx.features; ++k) {
      const Real x = b < ctx.batch ? row[k] : Real{0};
      if constexpr (sizeof(typename M::Weight) == 2) {
        out[k * kP] = bf16_nearest(x);
      } else {
        out[k * kP] = x;
      }
    }
  }
  __builtin_free(row);
}

template <class M, int kVectors, class Index>
WIDEHEAD_INLINE void row_logits(const DenseContext& ctx, const SparseRow<M, Index>& r, const Input<M>* x,
                                typename M::Real* z) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  // Two chains a vector: one alone would wait for its own multiply-add.
  Vec<Real> even[kVectors] = {}, odd[kVectors] = {};
  i64 k = 0;
  for (; k + 1 < ctx.fan_in; k += 2) {
    const Input<M>*a = x + i64{r.inputs[k]} * kP, *b = x + i64{r.inputs[k + 1]} * kP;
    const Vec<Real> wa = splat(r.weight[k]), wb = splat(r.weight[k + 1]);
    for (int v = 0; v < kVectors; ++v) {
      even[v] += wa * load_input(a + v * kLanes);
      odd[v] += wb * load_input(b + v * kLanes);
    }
  }
  if (k < ctx.fan_in)
    for (int v = 0; v < kVectors; ++v)
      even[v] += splat(r.weight[k]) * load_input(x + i64{r.inputs[k]} * kP + v * kLanes);
  for (int v = 0; v < kVectors; ++v) store(z + v * kLanes, even[v] + odd[v]);
}

// Z panel of the tile.
template <class M, class Index>
void sparse_logits(const DenseContext& ctx, const Tile<M>& t, SparseRow<M, Index>& r, i64 panel, typename M::Real* z,
                   int vectors) {
  constexpr i64 kP = Tile<M>::kP;
  const Input<M>* x = panel_inputs<M>(ctx, panel);
  for (i64 c = 0; c < t.count; ++c) {
    read_row<M>(ctx, t.first + c, r);
    if (vectors == 2) {
      row_logits<M, 2>(ctx, r, x, z + c * kP);
    } else {
      row_logits<M, 1>(ctx, r, x, z + c * kP);
    }
  }
}

template <class M>
Tile<M> carve_sparse_tile(const DenseGeometry& g, Carve& carve) {
  Tile<M> t{};
  t.add = carve.take<typename M::Real>(g.tile);
  t.bias = carve.take<typename M::Real>(g.tile);
  return t;
}

template <class M>
WIDEHEAD_INLINE int panel_vectors(const DenseContext& ctx, i64 b0) {
  return ctx.batch - b0 > Tile<M>::kP / 2 ? 2 : 1;
}

// The sums of kLanes vectors, in their order, by a tree that halves their number and doubles what a lane stands for.
template <class Real>
WIDEHEAD_INLINE Vec<Real> sum_each(Vec<Real>* v) {
  constexpr int kLanes = Simd<Real>::kLanes;
  typedef typename Simd<Real>::I I;
  I lower{}, upper{};
  for (int i = 0; i < kLanes; ++i) {
    lower[i] = static_cast<decltype(I{}[0] + 0)>(i / 2 + (i % 2) * kLanes);
    upper[i] = lower[i] + kLanes / 2;
  }
#pragma GCC unroll 8
  for (int n = kLanes; n > 1; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + n / 2], lower) + __builtin_shuffle(v[i], v[i + n / 2], upper);
  return v[0];
}

// What the gradient's kernel keeps for a tile.
template <class M>
struct SparseGradient {
  typename M::Real* g;       // [batch panel][tile][PW]
  typename M::Real* bias;    // [tile]
  typename M::Real* weight;  // [tile][K]; a row's whole vectors may reach into the next, which is written after it
  i64 tile;
};

// dW of kLanes inputs. One panel is the common case and has no loop, so that the sums never leave the registers.
template <class M, bool kOnePanel, class Index>
WIDEHEAD_INLINE Vec<typename M::Real> sum_inputs(const DenseContext& ctx, const SparseGradient<M>& q,
                                                 const Index* inputs, i64 c) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const Real* g = q.g + c * kP;
  const Input<M>* x = panel_inputs<M>(ctx, 0);
  Vec<Real> low = load(g), high = load(g + kLanes), sums[kLanes];
#pragma GCC unroll 16
  for (i64 i = 0; i < kLanes; ++i) {
    const Input<M>* at = x + i64{inputs[i]} * kP;
    sums[i] = low * load_input(at) + high * load_input(at + kLanes);
  }
  if constexpr (!kOnePanel) {
    for (i64 b = kP; b < ctx.batch; b += kP) {
      g += q.tile * kP;
      x += ctx.features * kP;
      low = load(g);
      high = load(g + kLanes);
      if (!any_nonzero(low) && !any_nonzero(high)) continue;
#pragma GCC unroll 16
      for (i64 i = 0; i < kLanes; ++i) {
        const Input<M>* at = x + i64{inputs[i]} * kP;
        sums[i] += low * load_input(at) + high * load_input(at + kLanes);
      }
    }
  }
  return sum_each<Real>(sums);
}

// dW of kLanes inputs from `k` on; past the fan-in, numbers that nobody reads.
template <class M, class Index>
WIDEHEAD_INLINE void row_weight(const DenseContext& ctx, const SparseGradient<M>& q, const SparseRow<M, Index>& r,
                                i64 c, i64 k) {
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const Index* inputs = r.inputs + k;
  Index last[kLanes];
  if (k + kLanes > ctx.fan_in) {
    for (i64 i = 0; i < kLanes; ++i) last[i] = inputs[k + i < ctx.fan_in ? i : 0];
    inputs = last;
  }
  if (ctx.batch <= kP) {
    store(q.weight + c * ctx.fan_in + k, sum_inputs<M, true>(ctx, q, inputs, c));
  } else {
    store(q.weight + c * ctx.fan_in + k, sum_inputs<M, false>(ctx, q, inputs, c));
  }
}

// Whether any example has a gradient for the class.
template <class M>
WIDEHEAD_INLINE bool any_gradient(const DenseContext& ctx, const SparseGradient<M>& q, i64 c) {
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  for (i64 panel = 0; panel < ceil_div(ctx.batch, kP); ++panel) {
    const typename M::Real* g = q.g + (panel * q.tile + c) * kP;
    if (any_nonzero(load(g)) || any_nonzero(load(g + kLanes))) return true;
  }
  return false;
}

// dX of one class with the weights from before the step. The inputs of a class are distinct, so a few rows can be loaded
// before the first is stored: loads that follow a store to the same place modulo 4096 wait for it.
template <class M, class Index>
WIDEHEAD_INLINE void add_row_hidden(const DenseContext& ctx, const SparseGradient<M>& q, const SparseRow<M, Index>& r,
                                    i64 c, typename M::Real* grad_hidden) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2, kBatch = 4;
  for (i64 panel = 0; panel < ceil_div(ctx.batch, kP); ++panel) {
    const Real* g = q.g + (panel * q.tile + c) * kP;
    const Vec<Real> low = load(g), high = load(g + kLanes);
    if (!any_nonzero(low) && !any_nonzero(high)) continue;
    Real* dx = grad_hidden + panel * ctx.features * kP;
    i64 k = 0;
    for (; k + kBatch <= ctx.fan_in; k += kBatch) {
      Real* at[kBatch];
      Vec<Real> a[kBatch], b[kBatch];
#pragma GCC unroll 4
      for (i64 i = 0; i < kBatch; ++i) {
        at[i] = dx + i64{r.inputs[k + i]} * kP;
        const Vec<Real> w = splat(r.weight[k + i]);
        a[i] = load(at[i]) + w * low;
        b[i] = load(at[i] + kLanes) + w * high;
      }
#pragma GCC unroll 4
      for (i64 i = 0; i < kBatch; ++i) {
        store(at[i], a[i]);
        store(at[i] + kLanes, b[i]);
      }
    }
    for (; k < ctx.fan_in; ++k) {
      Real* at = dx + i64{r.inputs[k]} * kP;
      const Vec<Real> w = splat(r.weight[k]);
      store(at, load(at) + w * low);
      store(at + kLanes, load(at + kLanes) + w * high);
    }
  }
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
