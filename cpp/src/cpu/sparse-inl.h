// sparse-inl.h -- the sparse head: its products class by class or group by group, the rest as in the dense head
//
// Hidden lies feature-major, [batch panel][feature][PW], so that one input of a class is two whole vectors for a panel of examples:
// contiguous loads from a place that is random by the row only. Z, G and the losses are the dense head's, on tiles of classes.
#pragma once
#include "cpu/sparse-group-inl.h"
#include "cpu/sparse-row-inl.h"

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
  g.columns_bytes = size(g.padded_batch * ctx.features) * sizeof(Input<M>);
  g.grad_bytes = size(g.padded_batch * ctx.features) * sizeof(Real);
  const std::size_t row = size(round_up(ctx.fan_in, kP)) * sizeof(Real) + 512;
  const std::size_t per_class = size(4 * g.tile) * sizeof(Real) + 512;
  const std::size_t group = ctx.group_size > 1 ? groups_bytes<M>(ctx, g) : 0;
  const i64 rows = g.tile + kRowStep;  // the micro-kernel may write so many beyond
  g.forward_scratch = size(rows * kP) * sizeof(Real) + per_class + row + group;
  const i64 gradients = g.tile * g.padded_batch + kRowStep * kP + g.tile * ctx.fan_in + kP;
  g.backward_scratch = size(gradients) * sizeof(Real) + per_class + row + group;
  return g;
}

// The products of one task, by rows or by groups.
template <class M, class Index>
class Products {
 public:
  using Real = typename M::Real;
  static constexpr i64 kP = Tile<M>::kP;

  Products(const DenseContext& ctx, const DenseGeometry& geometry, Carve& carve)
      : ctx_(ctx), grouped_(ctx.group_size > 1), row_(carve_row<M, Index>(ctx, carve)) {
    if (!grouped_) return;
    groups_ = carve_groups<M>(ctx, geometry, carve);
    // Places past the fan-in are multiplied too; their products are not used, but NaN would spread.
    __builtin_memset(groups_.x, 0, static_cast<std::size_t>(groups_.panels * kP * kP) * sizeof(Real));
  }

  void begin(const Tile<M>& t) {
    if (grouped_) pack_groups<M>(ctx_, t, groups_);
  }
  void logits(const Tile<M>& t, i64 panel, Real* z, int vectors) {
    if (grouped_) {
      group_logits<M>(ctx_, t, groups_, panel, z, vectors);
    } else {
      sparse_logits<M, Index>(ctx_, t, row_, panel, z, vectors);
    }
  }
  // Groups: all of the tile at once.
  void gradients(const Tile<M>& t, const SparseGradient<M>& q, Real* grad_hidden, bool want_weight) {
    if (!grouped_) return;
    for (i64 c = 0; c < t.count; c += groups_.size)
      for (i64 panel = 0; panel < ceil_div(ctx_.batch, kP); ++panel)
        group_gradient<M>(ctx_, t, groups_, c, panel, q.g + panel * q.tile * kP, grad_hidden, want_weight);
  }
  // dW of class c of the tile; rows: with its part of dX.
  void row(const Tile<M>& t, const SparseGradient<M>& q, i64 c, Real* grad_hidden, bool want_weight) {
    if (grouped_) {
      if (want_weight) read_group_grad<M>(ctx_, groups_, c, q.weight + c * ctx_.fan_in);
      return;
    }
    const bool any = any_gradient<M>(ctx_, q, c);
    if (!any && want_weight)
      __builtin_memset(q.weight + c * ctx_.fan_in, 0, static_cast<std::size_t>(ctx_.fan_in) * sizeof(Real));
    if (!any) return;
    read_row<M, Index>(ctx_, t.first + c, row_);
    if (want_weight)
      for (i64 k = 0; k < ctx_.fan_in; k += kP / 2) row_weight<M, Index>(ctx_, q, row_, c, k);
    if (grad_hidden) add_row_hidden<M, Index>(ctx_, q, row_, c, grad_hidden);
  }

 private:
  const DenseContext& ctx_;
  bool grouped_;
  SparseRow<M, Index> row_;
  Groups<M> groups_{};
};

// Calls f(tile, b0, z, vectors) with the finished logits of every panel of examples, tile after tile.
template <class M, class Index, class F>
void for_each_sparse_panel(const DenseContext& ctx, const DenseGeometry& g, i64 first_tile, i64 end_tile, void* scratch,
                           F f) {
  constexpr i64 kP = Tile<M>::kP;
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_sparse_tile<M>(g, carve);
  Products<M, Index> products(ctx, g, carve);
  auto* z = carve.take<typename M::Real>((g.tile + kRowStep) * kP);
  for (i64 index = first_tile; index < end_tile; ++index) {
    place_tile<M>(ctx, t, g.tile, index);
    products.begin(t);
    for (i64 b0 = 0; b0 < ctx.batch; b0 += kP) {
      const int vectors = panel_vectors<M>(ctx, b0);
      products.logits(t, b0 / kP, z, vectors);
      finish_logits<M>(ctx, t, b0, z, vectors);
      f(t, b0, z, vectors);
    }
  }
}

template <class M, class Index>
void sparse_backward(const DenseContext& ctx, const DenseGeometry& geometry, BackwardTask& task, void* scratch) {
  using Real = typename M::Real;
  constexpr i64 kP = Tile<M>::kP;
  Carve carve{static_cast<char*>(scratch)};
  Tile<M> t = carve_sparse_tile<M>(geometry, carve);
  Products<M, Index> products(ctx, geometry, carve);
  SparseGradient<M> q{};
  q.tile = geometry.tile;
  q.g = carve.take<Real>(geometry.tile * geometry.padded_batch + kRowStep * kP);
  q.bias = carve.take<Real>(geometry.tile);
  q.weight = carve.take<Real>(geometry.tile * ctx.fan_in + kP);
  const bool want_bias = (task.update && ctx.bias) || task.grad_bias;
  auto* grad_hidden = static_cast<Real*>(task.grad_hidden);
  const UpdateScalars<Real> scalars = task.update ? UpdateScalars<Real>(*task.update) : UpdateScalars<Real>{};
  const AnyMatrix weight(ctx.weight, ctx.weight_dtype, ctx.classes, ctx.fan_in, ctx.weight_stride);
  for (i64 index = task.first_tile; index < task.end_tile; ++index) {
    place_tile<M>(ctx, t, geometry.tile, index);
    products.begin(t);
    __builtin_memset(q.bias, 0, static_cast<std::size_t>(t.count) * sizeof(Real));
    for (i64 b0 = 0; b0 < ctx.batch; b0 += kP) {
      const int vectors = panel_vectors<M>(ctx, b0);
      Real* g = q.g + b0 / kP * q.tile * kP;
      products.logits(t, b0 / kP, g, vectors);
      finish_logits<M>(ctx, t, b0, g, vectors);
      if (task.losses) accumulate_losses<M>(ctx, t, b0, g, vectors, *task.losses);
      gradient_panel<M>(ctx, t, b0, g, vectors);
      gradient_entries<M>(ctx, t, b0, g);
      const i64 lanes = at_most(ctx.batch - b0, kP);
      for (i64 c = 0; c < t.count; ++c)
        for (i64 lane = lanes; lane < kP; ++lane) g[c * kP + lane] = 0;
      if (want_bias) sum_bias<M>(t, g, q.bias);
    }
    products.gradients(t, q, grad_hidden, task.want_weight);
    for (i64 c = 0; c < t.count; ++c) products.row(t, q, c, grad_hidden, task.want_weight);
    if (task.update) {
      update_rows_as<Real>(*task.update, scalars, weight, t.first, t.count, q.weight);
    } else if (task.want_weight) {
      for (i64 c = 0; c < t.count; ++c) write_row<Real>(task.grad_weight, t.first + c, q.weight + c * ctx.fan_in);
    }
    if (task.update && ctx.bias)
      update_bias(*task.update, AnyVector(ctx.bias, ctx.bias_dtype, ctx.classes), t.first, t.count, q.bias);
    if (task.grad_bias)
      for (i64 c = 0; c < t.count; ++c)
        write_row<Real>({task.grad_bias.data, task.grad_bias.dtype, ctx.classes, 1, 1}, t.first + c, q.bias + c);
  }
}

template <class M, class Index>
void sparse_scores(const DenseContext& ctx, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
  using Real = typename M::Real;
  const auto size = static_cast<std::size_t>(round_up(ctx.fan_in, Tile<M>::kP)) * sizeof(Real) + 512;
  auto* h = static_cast<Real*>(__builtin_malloc(static_cast<std::size_t>(ctx.features) * sizeof(Real) + size + 64));
  Carve carve{reinterpret_cast<char*>(h + ctx.features)};
  SparseRow<M, Index> r = carve_row<M, Index>(ctx, carve);
  for (i64 b = first; b < end; ++b) {
    read_hidden<M>(ctx, b, h);
    for (i64 j = 0; j < n; ++j) {
      const i64 c = classes[b * n + j];
      read_row<M, Index>(ctx, c, r);
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
// Calls f with the mode and an index.
template <class F>
WIDEHEAD_INLINE void with_mode_and_index(const DenseContext& ctx, F f) {
  with_wide_mode(ctx.weight_dtype, [&]<class M>(M mode) {
    if (ctx.index_dtype == Dtype::u16) {
      f(mode, uint16_t{});
    } else {
      f(mode, int32_t{});
    }
  });
}

inline HeadKernels sparse_table() {
  HeadKernels k{};
  k.geometry = [](const DenseContext& c) {
    return with_wide_mode(c.weight_dtype, [&]<class M>(M) { return sparse_geometry<M>(c); });
  };
  k.pack_columns = [](const DenseContext& c, const DenseGeometry&, i64 block) {
    with_wide_mode(c.weight_dtype, [&]<class M>(M) { pack_inputs<M>(c, block); });
  };
  k.pack_rows = [](const DenseContext&, const DenseGeometry&, i64) {};
  k.forward = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, ForwardPartial& p, void* scratch) {
    with_mode_and_index(c, [&]<class M, class Index>(M, Index) {
      for_each_sparse_panel<M, Index>(c, g, first, end, scratch, [&](const Tile<M>& t, i64 b0, auto* z, int vectors) {
        accumulate_losses<M>(c, t, b0, z, vectors, p);
      });
    });
  };
  k.backward = [](const DenseContext& c, const DenseGeometry& g, BackwardTask& task, void* scratch) {
    with_mode_and_index(c, [&]<class M, class Index>(M, Index) { sparse_backward<M, Index>(c, g, task, scratch); });
  };
  k.topk = [](const DenseContext& c, const DenseGeometry& g, TopKTask& task, void* scratch) {
    with_mode_and_index(c, [&]<class M, class Index>(M, Index) {
      for_each_sparse_panel<M, Index>(
          c, g, task.first_tile, task.end_tile, scratch,
          [&](const Tile<M>& t, i64 b0, auto* z, int vectors) { best_of_panel<M>(c, task, t, b0, z, vectors); });
    });
  };
  k.logits = [](const DenseContext& c, const DenseGeometry& g, i64 first, i64 end, AnyMatrix out, void* scratch) {
    with_mode_and_index(c, [&]<class M, class Index>(M, Index) {
      for_each_sparse_panel<M, Index>(
          c, g, first, end, scratch, [&](const Tile<M>& t, i64 b0, auto* z, int) { write_panel<M>(c, t, b0, z, out); });
    });
  };
  k.scores = [](const DenseContext& c, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out) {
    with_mode_and_index(
        c, [&]<class M, class Index>(M, Index) { sparse_scores<M, Index>(c, first, end, classes, n, out); });
  };
  return k;
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
