// dense-inl.h -- the fused dense head: what is done with each tile of classes while it is in cache
#pragma once
#include "cpu/dense-loss-inl.h"
#include "cpu/topk-inl.h"
#include "cpu/update-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

template <class M>
Tile<M> carve_tile(const DenseGeometry& g, const Shape<M>& s, Carve& carve, bool backward) {
  Tile<M> t{};
  t.weight = carve.take<typename M::Elem>(g.tile * s.weight_panels * Tile<M>::kP);
  t.weight_rows = t.weight;
  if (M::kPack == 2 && backward)
    t.weight_rows = carve.take<typename M::Elem>(g.tile / 2 * s.feature_panels * Tile<M>::kP);
  t.add = carve.take<typename M::Real>(g.tile);
  t.bias = carve.take<typename M::Real>(g.tile);
  return t;
}

// Calls f(tile, b0, z, vectors) with the finished logits of every panel of examples, tile after tile.
template <class M, class F>
void for_each_panel(const DenseContext& ctx, const DenseGeometry& g, i64 first_tile, i64 end_tile, void* scratch, F f) {
  using S = Shape<M>;
  const S s(ctx.batch, ctx.features);
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_tile<M>(g, s, carve, false);
  auto* z = carve.take<typename M::Real>(g.tile * S::kP);
  for (i64 index = first_tile; index < end_tile; ++index) {
    begin_tile<M>(ctx, s, t, g.tile, index, ctx.batch);
    for (i64 b0 = 0; b0 < ctx.batch; b0 += S::kP) {
      const int vectors = s.vectors(ctx.batch - b0);
      tile_logits<M>(ctx, s, t, b0 / S::kBlock, b0 % S::kBlock / S::kP, z, vectors);
      finish_logits<M>(ctx, t, b0, z, vectors);
      f(t, b0, z, vectors);
    }
  }
}

template <class M>
void forward(const DenseContext& ctx, const DenseGeometry& g, i64 first_tile, i64 end_tile, ForwardPartial& partial,
             void* scratch) {
  for_each_panel<M>(ctx, g, first_tile, end_tile, scratch, [&](const Tile<M>& t, i64 b0, auto* z, int vectors) {
    accumulate_losses<M>(ctx, t, b0, z, vectors, partial);
  });
}

// What backward keeps for one tile beside the packed weights.
template <class M>
struct GradientTile {
  using Real = typename M::Real;
  using Elem = typename M::Elem;
  Real* g;        // [batch panel][padded][PW]
  Real* grad;     // dW, [feature panel][padded][PW]
  Real* bias;     // [tile] sum of G over the batch
  Real* row;      // [feature panels * PW] one row of dW
  Elem* columns;  // pairs of classes of one panel, [padded / 2][PW]; only where pack is 2
  Elem* rows;     // pairs of examples, [batch panel / 2][padded][PW]; only where pack is 2
};

template <class M>
GradientTile<M> carve_gradient(const DenseGeometry& g, const Shape<M>& s, Carve& carve) {
  constexpr i64 kP = Shape<M>::kP;
  const i64 block = at_most(Shape<M>::kBlock, g.padded_batch);
  GradientTile<M> q{};
  q.g = carve.take<typename M::Real>(g.tile * block);
  q.grad = carve.take<typename M::Real>(g.tile * s.feature_panels * kP);
  q.bias = carve.take<typename M::Real>(g.tile);
  q.row = carve.take<typename M::Real>(s.feature_panels * kP);
  if (M::kPack == 2) {
    q.columns = carve.take<typename M::Elem>(g.tile / 2 * kP);
    q.rows = carve.take<typename M::Elem>(g.tile * block / 2);
  }
  return q;
}

#ifdef WIDEHEAD_BF16_DOT
// One panel of G in bfloat16, paired along the classes and along the examples.
inline void pack_gradient(const Tile<ModeBf16Dot>& t, GradientTile<ModeBf16Dot>& q, i64 panel) {
  constexpr i64 kP = Tile<ModeBf16Dot>::kP, kLanes = kP / 2;
  const float* g = q.g + panel * t.padded * kP;
  auto* rows = reinterpret_cast<uint16_t*>(q.rows + panel / 2 * t.padded * kP) + panel % 2 * kP;
  for (i64 c = 0; c < t.padded; c += 2)
    for (int v = 0; v < 2; ++v) {
      const Words a = bf16_bits(load(g + c * kP + v * kLanes)), b = bf16_bits(load(g + (c + 1) * kP + v * kLanes));
      const Words pair = a | b << 16;
      __builtin_memcpy(q.columns + c / 2 * kP + v * kLanes, &pair, sizeof pair);
      store_halves(rows + c * 2 * kP + v * kLanes, a);
      store_halves(rows + (c + 1) * 2 * kP + v * kLanes, b);
    }
}
#endif

template <class M>
WIDEHEAD_INLINE void clear_lanes(const Tile<M>& t, typename M::Real* g, i64 first_lane) {
  for (i64 c = 0; c < t.padded; ++c)
    for (i64 lane = c < t.count ? first_lane : 0; lane < Tile<M>::kP; ++lane) g[c * Tile<M>::kP + lane] = 0;
}

template <class M>
bool all_below(const Tile<M>& t, const typename M::Real* g, double bound) {
  using Real = typename M::Real;
  Vec<Real> top{}, strange{};  // max drops a NaN, and a gradient that is none must not pass for a small one
  for (i64 i = 0; i < t.count * Tile<M>::kP; i += Simd<Real>::kLanes) {
    const Vec<Real> x = load(g + i);
    top = max(abs<Real>(x), top);
    strange += x - x;
  }
  return sum_lanes<Real>(strange) == 0 && static_cast<double>(max_lanes<Real>(top)) < bound;
}

template <class M>
void sum_bias(const Tile<M>& t, const typename M::Real* g, typename M::Real* bias) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP;
  for (i64 c = 0; c < t.count; ++c) bias[c] += sum_lanes<Real>(load(g + c * kP) + load(g + c * kP + kP / 2));
}

// G of one block of examples; false when every entry is below the filter.
template <class M>
bool gradient_block(const DenseContext& ctx, const Shape<M>& s, Tile<M>& t, GradientTile<M>& q, i64 block,
                    const BackwardTask& task) {
  constexpr i64 kP = Tile<M>::kP;
  bool keep = ctx.filter_below <= 0;
  const i64 panels = s.block_rows(block) / kP;
  for (i64 panel = 0; panel < panels; ++panel) {
    auto* g = q.g + panel * t.padded * kP;
    const i64 b0 = block * Shape<M>::kBlock + panel * kP, left = ctx.batch - b0;
    if (left > 0) {
      const int vectors = s.vectors(left);
      tile_logits<M>(ctx, s, t, block, panel, g, vectors);
      finish_logits<M>(ctx, t, b0, g, vectors);
      if (task.losses) accumulate_losses<M>(ctx, t, b0, g, vectors, *task.losses);
      gradient_panel<M>(ctx, t, b0, g, vectors);
      gradient_entries<M>(ctx, t, b0, g);
    }
    clear_lanes<M>(t, g, left > 0 ? at_most(left, kP) : 0);
    keep = keep || !all_below<M>(t, g, ctx.filter_below);
  }
  return keep;
}

template <class M>
void add_grad_hidden(const DenseContext& ctx, const Shape<M>& s, const Tile<M>& t, const GradientTile<M>& q, i64 block,
                     i64 panel, typename M::Real* grad_hidden) {
  constexpr i64 kP = Tile<M>::kP;
  const i64 rows = round_up(at_most(kP, ctx.batch - block * Shape<M>::kBlock - panel * kP), kRowStep);
  const i64 width = s.feature_panels * kP, block_rows = s.block_rows(block);
  auto* out = grad_hidden + block * Shape<M>::kBlock * width + panel * kP * kP;
  const typename M::Elem* a;
  if constexpr (M::kPack == 2) {
    a = q.columns;
  } else {
    a = q.g + panel * t.padded * kP;
  }
  Prefetch none;
  for (i64 f = 0; f < s.feature_panels; ++f)
    gemm_panel<M, Order::columns>(a, 0, rows, t.weight_rows + f * (t.padded / M::kPack) * kP, t.padded / M::kPack,
                                  out + f * block_rows * kP, true, s.vectors(s.features - f * kP), none);
}

template <class M>
void add_grad_weight(const DenseContext& ctx, const Shape<M>& s, const Tile<M>& t, const GradientTile<M>& q, i64 block,
                     bool accumulate) {
  constexpr i64 kP = Tile<M>::kP;
  const i64 width = s.feature_panels * kP, stored = s.block_rows(block) / M::kPack,
            depth = ceil_div(s.block_batch(block), M::kPack);
  const auto* rows =
      static_cast<const typename M::Elem*>(ctx.packed_rows) + block * Shape<M>::kBlock / M::kPack * width;
  const typename M::Elem* a;
  if constexpr (M::kPack == 2) {
    a = q.rows;
  } else {
    a = q.g;
  }
  Prefetch none;
  for (i64 f = 0; f < s.feature_panels; ++f)
    gemm_panel<M, Order::rows>(a, t.padded * kP, t.padded, rows + f * stored * kP, depth, q.grad + f * t.padded * kP,
                               accumulate, s.vectors(s.features - f * kP), none);
}

template <class Real>
void write_row(AnyMatrix out, i64 row, const Real* g) {
  const i64 at = row * out.stride;
  if (out.dtype == Dtype::f64) {
    for (i64 k = 0; k < out.cols; ++k) static_cast<double*>(out.data)[at + k] = static_cast<double>(g[k]);
  } else if (out.dtype == Dtype::f32) {
    for (i64 k = 0; k < out.cols; ++k) static_cast<float*>(out.data)[at + k] = static_cast<float>(g[k]);
  } else {
    for (i64 k = 0; k < out.cols; ++k)
      static_cast<uint16_t*>(out.data)[at + k] = bf16_nearest(static_cast<float>(g[k]));
  }
}

// Hands the rows of dW to the caller or to the optimiser.
template <class M>
void finish_tile(const DenseContext& ctx, const Shape<M>& s, const Tile<M>& t, GradientTile<M>& q,
                 const BackwardTask& task) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP, kLanes = kP / 2;
  const AnyMatrix weight(ctx.weight, ctx.weight_dtype, ctx.classes, ctx.features, ctx.weight_stride);
  for (i64 c = 0; c < t.count && task.want_weight; ++c) {
    for (i64 f = 0; f < s.feature_panels; ++f)
      for (int v = 0; v < 2; ++v)
        store(q.row + f * kP + v * kLanes, load(q.grad + (f * t.padded + c) * kP + v * kLanes));
    if (task.update) {
      update_row(*task.update, weight, t.first + c, q.row);
    } else {
      write_row<Real>(task.grad_weight, t.first + c, q.row);
    }
  }
  if (task.update && ctx.bias)
    update_bias(*task.update, AnyVector(ctx.bias, ctx.bias_dtype, ctx.classes), t.first, t.count, q.bias);
  if (task.grad_bias)
    for (i64 c = 0; c < t.count; ++c)
      write_row<Real>({task.grad_bias.data, task.grad_bias.dtype, ctx.classes, 1, 1}, t.first + c, q.bias + c);
}

template <class M>
void backward(const DenseContext& ctx, const DenseGeometry& geometry, BackwardTask& task, void* scratch) {
  using Real = typename M::Real;
  const Shape<M> s(ctx.batch, ctx.features);
  constexpr i64 kP = Shape<M>::kP;
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_tile<M>(geometry, s, carve, true);
  GradientTile<M> q = carve_gradient<M>(geometry, s, carve);
  const bool want_bias = (task.update && ctx.bias) || task.grad_bias;
  for (i64 index = task.first_tile; index < task.end_tile; ++index) {
    begin_tile<M>(ctx, s, t, geometry.tile, index,
                  at_most((task.end_block - task.first_block) * Shape<M>::kBlock, ctx.batch));
#ifdef WIDEHEAD_BF16_DOT
    if constexpr (M::kPack == 2) {
      if (task.grad_hidden) pack_weight_rows(s, t);
    }
#endif
    bool have_grad = false;
    if (want_bias) __builtin_memset(q.bias, 0, static_cast<std::size_t>(t.count) * sizeof(Real));
    for (i64 block = task.first_block; block < task.end_block; ++block) {
      if (!gradient_block<M>(ctx, s, t, q, block, task)) {
        ++task.filtered;
        continue;
      }
      for (i64 panel = 0; panel < s.block_rows(block) / kP; ++panel) {
        if (want_bias) sum_bias<M>(t, q.g + panel * t.padded * kP, q.bias);
#ifdef WIDEHEAD_BF16_DOT
        if constexpr (M::kPack == 2) pack_gradient(t, q, panel);
#endif
        if (task.grad_hidden && block * Shape<M>::kBlock + panel * kP < ctx.batch)
          add_grad_hidden<M>(ctx, s, t, q, block, panel, static_cast<Real*>(task.grad_hidden));
      }
      if (task.want_weight) add_grad_weight<M>(ctx, s, t, q, block, have_grad);
      have_grad = true;
    }
    if (task.want_weight && !have_grad) {
      const bool plain_sgd = task.update && task.update->optimizer == Optimizer::sgd && !task.update->first &&
                             task.update->weight_decay == 0;
      if (plain_sgd && !task.grad_bias) continue;
      __builtin_memset(q.grad, 0, static_cast<std::size_t>(t.padded * s.feature_panels * kP) * sizeof(Real));
    }
    if (task.want_weight || want_bias) finish_tile<M>(ctx, s, t, q, task);
  }
}

template <class M>
void write_panel(const DenseContext& ctx, const Tile<M>& t, i64 b0, const typename M::Real* z, AnyMatrix out) {
  constexpr i64 kP = Tile<M>::kP;
  for (i64 lane = 0; lane < at_most(kP, ctx.batch - b0); ++lane)
    for (i64 c = 0; c < t.count; ++c) {
      const i64 at = (b0 + lane) * out.stride + t.first + c;
      if (out.dtype == Dtype::f64) {
        static_cast<double*>(out.data)[at] = static_cast<double>(z[c * kP + lane]);
      } else {
        static_cast<float*>(out.data)[at] = static_cast<float>(z[c * kP + lane]);
      }
    }
}

template <class M>
void best_of_panel(const DenseContext& ctx, TopKTask& task, const Tile<M>& t, i64 b0, const typename M::Real* z,
                   int vectors) {
  if (task.lse) accumulate_lse<M>(t, z, vectors, PartialView<M>(*task.lse, b0));
  topk_panel<M>(task, t, z, b0, at_most(Tile<M>::kP, ctx.batch - b0));
}

template <class M>
void logits(const DenseContext& ctx, const DenseGeometry& g, i64 first_tile, i64 end_tile, AnyMatrix out,
            void* scratch) {
  for_each_panel<M>(ctx, g, first_tile, end_tile, scratch,
                    [&](const Tile<M>& t, i64 b0, auto* z, int) { write_panel<M>(ctx, t, b0, z, out); });
}

template <class M>
void topk(const DenseContext& ctx, const DenseGeometry& g, TopKTask& task, void* scratch) {
  for_each_panel<M>(
      ctx, g, task.first_tile, task.end_tile, scratch,
      [&](const Tile<M>& t, i64 b0, auto* z, int vectors) { best_of_panel<M>(ctx, task, t, b0, z, vectors); });
}

// Products of single rows, for the few classes that a caller names.
template <class M>
void scores(const DenseContext& ctx, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
  using Real = typename M::Real;
  const i64 d = ctx.features;
  auto* h = static_cast<Real*>(__builtin_malloc(static_cast<std::size_t>(2 * d) * sizeof(Real)));
  Real* w = h + d;
  for (i64 b = first; b < end; ++b) {
    read_hidden<M>(ctx, b, h);
    for (i64 j = 0; j < n; ++j) {
      const i64 c = classes[b * n + j];
      const auto* row = static_cast<const typename M::Weight*>(ctx.weight) + c * ctx.weight_stride;
      for (i64 k = 0; k < d; ++k) {
        if constexpr (sizeof(typename M::Weight) == 2) {
          w[k] = bf16_float(row[k]);
        } else {
          w[k] = row[k];
        }
      }
      Vec<Real> sum{};
      i64 k = 0;
      for (; k + Simd<Real>::kLanes <= d; k += Simd<Real>::kLanes) sum += load(h + k) * load(w + k);
      Real z = sum_lanes<Real>(sum);
      for (; k < d; ++k) z += h[k] * w[k];
      if (ctx.bias) z += bias_of<Real>(ctx, c);
      const double cap = ctx.loss.softcap;
      if (cap > 0) z = static_cast<Real>(cap * __builtin_tanh(static_cast<double>(z) / cap));
      if (out.dtype == Dtype::f64) {
        static_cast<double*>(out.data)[b * out.stride + j] = static_cast<double>(z);
      } else {
        static_cast<float*>(out.data)[b * out.stride + j] = static_cast<float>(z);
      }
    }
  }
  __builtin_free(h);
}

// Calls f with the mode of a weight dtype.
template <class F>
WIDEHEAD_INLINE auto with_mode(Dtype weight, F f) {
  if (weight == Dtype::f64) return f(ModeF64{});
  if (weight == Dtype::bf16) return f(ModeBf16{});
  return f(ModeF32{});
}

inline HeadKernels dense_table() {
  HeadKernels k{};
  k.geometry = [](const DenseContext& c) {
    return with_mode(c.weight_dtype, [&]<class M>(M) { return geometry_as<M>(c); });
  };
  k.pack_columns = [](const DenseContext& c, const DenseGeometry& g, i64 block) {
    with_mode(c.weight_dtype, [&]<class M>(M) { pack_columns<M>(c, g, block); });
  };
  k.pack_rows = [](const DenseContext& c, const DenseGeometry& g, i64 block) {
    with_mode(c.weight_dtype, [&]<class M>(M) { pack_rows<M>(c, g, block); });
  };
  k.forward = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, ForwardPartial& p, void* scratch) {
    with_mode(c.weight_dtype, [&]<class M>(M) { forward<M>(c, g, first, end, p, scratch); });
  };
  k.backward = [](const DenseContext& c, const DenseGeometry& g, BackwardTask& task, void* scratch) {
    with_mode(c.weight_dtype, [&]<class M>(M) { backward<M>(c, g, task, scratch); });
  };
  k.topk = [](const DenseContext& c, const DenseGeometry& g, TopKTask& task, void* scratch) {
    with_mode(c.weight_dtype, [&]<class M>(M) { topk<M>(c, g, task, scratch); });
  };
  k.logits = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, AnyMatrix out, void* scratch) {
    with_mode(c.weight_dtype, [&]<class M>(M) { logits<M>(c, g, first, end, out, scratch); });
  };
  k.scores = [](const DenseContext& c, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
    with_mode(c.weight_dtype, [&]<class M>(M) { scores<M>(c, first, end, classes, n, out); });
  };
  return k;
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
