// sparse-inl.h -- the sparse head: products over the few inputs of each class, the rest as in the dense head
//
// Hidden lies feature-major, [batch panel][feature][PW], so that one input of a class is two whole vectors for a panel of examples:
// contiguous loads from a place that is random by the row only. Z, G and the losses are the dense head's, on tiles of classes.
#pragma once
#include "cpu/dense-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// Classes of a tile: whole groups, few enough that the inputs of a panel which their logits have touched are still in the
// first-level cache when the gradient wants them again.
template <class Real>
i64 sparse_tile(const DenseContext& ctx) {
  const i64 group_bytes = ctx.fan_in * kPanel<Real> * static_cast<i64>(sizeof(Real));
  const i64 groups = (i64{1} << 15) / group_bytes, most = ceil_div(64, ctx.group_size);
  return ctx.group_size * (groups < 1 ? 1 : at_most(groups, most));
}

template <class M>
DenseGeometry sparse_geometry(const DenseContext& ctx) {
  constexpr i64 kP = Tile<M>::kP;
  using Real = typename M::Real;
  const auto size = [](i64 n) { return static_cast<std::size_t>(n); };
  DenseGeometry g{};
  g.panel = kP;
  g.tile = sparse_tile<Real>(ctx);
  g.block = Shape<M>::kBlock;
  g.padded_batch = round_up(ctx.batch, kP);
  g.blocks = ceil_div(g.padded_batch, g.block);
  g.real_bytes = sizeof(Real);
  g.feature_major = true;
  g.partial_bytes = std::size_t{16} << 20;
  g.columns_bytes = g.grad_bytes = size(g.padded_batch * ctx.features) * sizeof(Real);
  const std::size_t row = size(round_up(ctx.fan_in, kP)) * (2 * sizeof(Real) + sizeof(int32_t)) + 512;
  const std::size_t per_class = size(4 * g.tile) * sizeof(Real) + 512;
  g.forward_scratch = size(g.tile * kP) * sizeof(Real) + per_class + row;
  g.backward_scratch = size(g.tile * g.padded_batch) * sizeof(Real) + per_class + row;
  return g;
}

// One class's inputs and weights, widened.
template <class M>
struct SparseRow {
  int32_t* inputs;           // [K]
  typename M::Real* weight;  // [K]
  typename M::Real* grad;    // [K]
  i64 group = -1;            // whose inputs these are
};

template <class M>
SparseRow<M> carve_row(const DenseContext& ctx, Carve& carve) {
  const i64 n = round_up(ctx.fan_in, Tile<M>::kP);
  SparseRow<M> r{};
  r.inputs = carve.take<int32_t>(n);
  r.weight = carve.take<typename M::Real>(n);
  r.grad = carve.take<typename M::Real>(n);
  r.group = -1;
  return r;
}

template <class M>
WIDEHEAD_INLINE void read_row(const DenseContext& ctx, i64 cls, SparseRow<M>& r) {
  const i64 group = cls / ctx.group_size;
  if (group != r.group) {
    r.group = group;
    const i64 at = group * ctx.index_stride;
    if (ctx.index_dtype == Dtype::u16) {
      for (i64 k = 0; k < ctx.fan_in; ++k) r.inputs[k] = static_cast<const uint16_t*>(ctx.index)[at + k];
    } else {
      for (i64 k = 0; k < ctx.fan_in; ++k) r.inputs[k] = static_cast<const int32_t*>(ctx.index)[at + k];
    }
  }
  const auto* w = static_cast<const typename M::Weight*>(ctx.weight) + cls * ctx.weight_stride;
  for (i64 k = 0; k < ctx.fan_in; ++k) {
    if constexpr (sizeof(typename M::Weight) == 2) {
      r.weight[k] = bf16_float(w[k]);
    } else {
      r.weight[k] = w[k];
    }
  }
}

// The inputs of one panel of examples, [feature][PW].
template <class M>
WIDEHEAD_INLINE const typename M::Real* panel_inputs(const DenseContext& ctx, i64 panel) {
  return static_cast<const typename M::Real*>(ctx.packed_columns) + panel * ctx.features * Tile<M>::kP;
}

template <class M, int kVectors>
WIDEHEAD_INLINE void row_logits(const DenseContext& ctx, const SparseRow<M>& r, const typename M::Real* x,
                                typename M::Real* z) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  // Two chains a vector: one alone would wait for its own multiply-add.
  Vec<Real> even[kVectors] = {}, odd[kVectors] = {};
  i64 k = 0;
  for (; k + 1 < ctx.fan_in; k += 2) {
    const Real *a = x + r.inputs[k] * kP, *b = x + r.inputs[k + 1] * kP;
    const Vec<Real> wa = splat(r.weight[k]), wb = splat(r.weight[k + 1]);
    for (int v = 0; v < kVectors; ++v) {
      even[v] += wa * load(a + v * kLanes);
      odd[v] += wb * load(b + v * kLanes);
    }
  }
  if (k < ctx.fan_in)
    for (int v = 0; v < kVectors; ++v) even[v] += splat(r.weight[k]) * load(x + r.inputs[k] * kP + v * kLanes);
  for (int v = 0; v < kVectors; ++v) store(z + v * kLanes, even[v] + odd[v]);
}

// Z panel of the tile.
template <class M>
void sparse_logits(const DenseContext& ctx, const Tile<M>& t, SparseRow<M>& r, i64 panel, typename M::Real* z,
                   int vectors) {
  constexpr i64 kP = Tile<M>::kP;
  const typename M::Real* x = panel_inputs<M>(ctx, panel);
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

// Calls f(tile, b0, z, vectors) with the finished logits of every panel of examples, tile after tile.
template <class M, class F>
void for_each_sparse_panel(const DenseContext& ctx, const DenseGeometry& g, i64 first_tile, i64 end_tile, void* scratch,
                           F f) {
  constexpr i64 kP = Tile<M>::kP;
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_sparse_tile<M>(g, carve);
  SparseRow<M> r = carve_row<M>(ctx, carve);
  auto* z = carve.take<typename M::Real>(g.tile * kP);
  for (i64 index = first_tile; index < end_tile; ++index) {
    place_tile<M>(ctx, t, g.tile, index);
    for (i64 b0 = 0; b0 < ctx.batch; b0 += kP) {
      const int vectors = panel_vectors<M>(ctx, b0);
      sparse_logits<M>(ctx, t, r, b0 / kP, z, vectors);
      finish_logits<M>(ctx, t, b0, z, vectors);
      f(t, b0, z, vectors);
    }
  }
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
  typename M::Real* g;     // [batch panel][tile][PW]
  typename M::Real* bias;  // [tile]
  i64 tile;
};

// dW of kLanes inputs from `k` on.
template <class M>
WIDEHEAD_INLINE void add_row_weight(const DenseContext& ctx, const SparseGradient<M>& q, SparseRow<M>& r, i64 c,
                                    i64 k) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const i64 count = at_most(kLanes, ctx.fan_in - k), panels = ceil_div(ctx.batch, kP);
  const int32_t* inputs = r.inputs + k;
  Vec<Real> sums[kLanes] = {};
  for (i64 panel = 0; panel < panels; ++panel) {
    const Real* g = q.g + (panel * q.tile + c) * kP;
    const Vec<Real> low = load(g), high = load(g + kLanes);
    if (!any_nonzero(low) && !any_nonzero(high)) continue;
    const Real* x = panel_inputs<M>(ctx, panel);
    if (count == kLanes) {
#pragma GCC unroll 16
      for (i64 i = 0; i < kLanes; ++i) {
        const Real* at = x + inputs[i] * kP;
        sums[i] += low * load(at) + high * load(at + kLanes);
      }
    } else {
      for (i64 i = 0; i < count; ++i) {
        const Real* at = x + inputs[i] * kP;
        sums[i] += low * load(at) + high * load(at + kLanes);
      }
    }
  }
  store(r.grad + k, sum_each<Real>(sums));
}

// dX of one class with the weights from before the step. The inputs of a class are distinct, so a few rows can be loaded
// before the first is stored: loads that follow a store to the same place modulo 4096 wait for it.
template <class M>
WIDEHEAD_INLINE void add_row_hidden(const DenseContext& ctx, const SparseGradient<M>& q, const SparseRow<M>& r, i64 c,
                                    typename M::Real* grad_hidden) {
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
        at[i] = dx + r.inputs[k + i] * kP;
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
      Real* at = dx + r.inputs[k] * kP;
      const Vec<Real> w = splat(r.weight[k]);
      store(at, load(at) + w * low);
      store(at + kLanes, load(at + kLanes) + w * high);
    }
  }
}

template <class M>
void sparse_backward(const DenseContext& ctx, const DenseGeometry& geometry, BackwardTask& task, void* scratch) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP;
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_sparse_tile<M>(geometry, carve);
  SparseRow<M> r = carve_row<M>(ctx, carve);
  SparseGradient<M> q{};
  q.tile = geometry.tile;
  q.g = carve.take<Real>(geometry.tile * geometry.padded_batch);
  q.bias = carve.take<Real>(geometry.tile);
  const bool want_bias = (task.update && ctx.bias) || task.grad_bias;
  auto* grad_hidden = static_cast<Real*>(task.grad_hidden);
  const UpdateScalars<Real> scalars = task.update ? UpdateScalars<Real>(*task.update) : UpdateScalars<Real>{};
  const AnyMatrix weight(ctx.weight, ctx.weight_dtype, ctx.classes, ctx.fan_in, ctx.weight_stride);
  for (i64 index = task.first_tile; index < task.end_tile; ++index) {
    place_tile<M>(ctx, t, geometry.tile, index);
    __builtin_memset(q.bias, 0, static_cast<std::size_t>(t.count) * sizeof(Real));
    for (i64 b0 = 0; b0 < ctx.batch; b0 += kP) {
      const int vectors = panel_vectors<M>(ctx, b0);
      Real* g = q.g + b0 / kP * q.tile * kP;
      sparse_logits<M>(ctx, t, r, b0 / kP, g, vectors);
      finish_logits<M>(ctx, t, b0, g, vectors);
      if (task.losses) accumulate_losses<M>(ctx, t, b0, g, vectors, *task.losses);
      gradient_panel<M>(ctx, t, b0, g, vectors);
      gradient_entries<M>(ctx, t, b0, g);
      const i64 lanes = at_most(ctx.batch - b0, kP);
      for (i64 c = 0; c < t.count; ++c)
        for (i64 lane = lanes; lane < kP; ++lane) g[c * kP + lane] = 0;
      if (want_bias) sum_bias<M>(t, g, q.bias);
    }
    for (i64 c = 0; c < t.count; ++c) {
      read_row<M>(ctx, t.first + c, r);
      if (task.want_weight)
        for (i64 k = 0; k < ctx.fan_in; k += kP / 2) add_row_weight<M>(ctx, q, r, c, k);
      if (grad_hidden) add_row_hidden<M>(ctx, q, r, c, grad_hidden);
      if (task.update) {
        update_row_as<Real>(*task.update, scalars, weight, t.first + c, r.grad);
      } else if (task.want_weight) {
        write_row<Real>(task.grad_weight, t.first + c, r.grad);
      }
    }
    if (task.update && ctx.bias)
      update_bias(*task.update, AnyVector(ctx.bias, ctx.bias_dtype, ctx.classes), t.first, t.count, q.bias);
    if (task.grad_bias)
      for (i64 c = 0; c < t.count; ++c)
        write_row<Real>({task.grad_bias.data, task.grad_bias.dtype, ctx.classes, 1, 1}, t.first + c, q.bias + c);
  }
}

template <class M>
void sparse_scores(const DenseContext& ctx, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
  using Real = typename M::Real;
  const auto size = static_cast<std::size_t>(round_up(ctx.fan_in, Tile<M>::kP)) * (2 * sizeof(Real) + 4) + 512;
  auto* h = static_cast<Real*>(__builtin_malloc(static_cast<std::size_t>(ctx.features) * sizeof(Real) + size + 64));
  Carve carve{reinterpret_cast<char*>(h + ctx.features)};
  SparseRow<M> r = carve_row<M>(ctx, carve);
  for (i64 b = first; b < end; ++b) {
    read_hidden<M>(ctx, b, h);
    for (i64 j = 0; j < n; ++j) {
      const i64 c = classes[b * n + j];
      read_row<M>(ctx, c, r);
      Real z = 0;
      for (i64 k = 0; k < ctx.fan_in; ++k) z += r.weight[k] * h[r.inputs[k]];
      if (ctx.bias) z += bias_of<Real>(ctx, c);
      if (out.dtype == Dtype::f64) {
        static_cast<double*>(out.data)[b * out.stride + j] = static_cast<double>(z);
      } else {
        static_cast<float*>(out.data)[b * out.stride + j] = static_cast<float>(z);
      }
    }
  }
  __builtin_free(h);
}

// As with_mode, but bfloat16 is always widened: there is no dot product over inputs that lie apart.
template <class F>
WIDEHEAD_INLINE auto with_wide_mode(Dtype weight, F f) {
  if (weight == Dtype::f64) return f(ModeF64{});
  if (weight == Dtype::bf16) return f(ModeBf16Wide{});
  return f(ModeF32{});
}

inline HeadKernels sparse_table() {
  HeadKernels k{};
  k.geometry = [](const DenseContext& c) {
    return with_wide_mode(c.weight_dtype, [&]<class M>(M) { return sparse_geometry<M>(c); });
  };
  k.pack_columns = [](const DenseContext& c, const DenseGeometry& g, i64 block) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) { pack_columns<M>(c, g, block); });
  };
  k.pack_rows = [](const DenseContext&, const DenseGeometry&, i64) {};
  k.forward = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, ForwardPartial& p, void* scratch) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) {
      for_each_sparse_panel<M>(c, g, first, end, scratch, [&](const Tile<M>& t, i64 b0, auto* z, int vectors) {
        accumulate_losses<M>(c, t, b0, z, vectors, p);
      });
    });
  };
  k.backward = [](const DenseContext& c, const DenseGeometry& g, BackwardTask& task, void* scratch) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) { sparse_backward<M>(c, g, task, scratch); });
  };
  k.topk = [](const DenseContext& c, const DenseGeometry& g, TopKTask& task, void* scratch) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) {
      for_each_sparse_panel<M>(
          c, g, task.first_tile, task.end_tile, scratch,
          [&](const Tile<M>& t, i64 b0, auto* z, int vectors) { best_of_panel<M>(c, task, t, b0, z, vectors); });
    });
  };
  k.logits = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, AnyMatrix out, void* scratch) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) {
      for_each_sparse_panel<M>(c, g, first, end, scratch,
                               [&](const Tile<M>& t, i64 b0, auto* z, int) { write_panel<M>(c, t, b0, z, out); });
    });
  };
  k.scores = [](const DenseContext& c, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) { sparse_scores<M>(c, first, end, classes, n, out); });
  };
  return k;
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
