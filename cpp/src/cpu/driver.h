// driver.h -- how the heads run on the CPU: partitions of the classes, one task each, combined in a fixed order
//
// A partition owns a range of class tiles, so no two tasks write the same weight. The number of partitions depends on the shape
// alone and their results are added in order: the same bits come out for any number of threads. The heads differ in the
// kernels alone; an Args has the fields of DenseForward, DenseBackward, ... as far as its head has them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/dense_prepare.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "widehead/parallel.h"
#include "widehead/random.h"
#include "widehead/topk.h"

namespace widehead::cpu {

struct Partition {
  i64 tiles, count;
  i64 first(i64 p) const { return tiles * p / count; }
};

// At least 16 tiles each, so that their own results weigh little; 8 to 64 of them, whatever the number of threads.
inline Partition partition(const DenseGeometry& g, i64 classes, std::size_t bytes_each) {
  const i64 tiles = (classes + g.tile - 1) / g.tile;
  const auto fit = static_cast<i64>(g.partial_bytes / std::max<std::size_t>(1, bytes_each));
  return {tiles, std::min(tiles, std::clamp<i64>(std::min(tiles / 16, fit), 8, 64))};
}

template <class Real>
struct Partials {
  std::vector<ForwardPartial> parts;
  i64 padded;

  static std::size_t size(const DenseGeometry& g, i64 batch, i64 count) {
    Arena a;
    carve(a, g, batch, count);
    return a.used();
  }
  static std::vector<ForwardPartial> carve(Arena& a, const DenseGeometry& g, i64 batch, i64 count) {
    std::vector<ForwardPartial> out(static_cast<std::size_t>(count));
    const auto n = static_cast<std::size_t>(g.padded_batch), b = static_cast<std::size_t>(batch);
    for (ForwardPartial& p : out)
      p = {a.take<Real>(n), a.take<Real>(n),   a.take<Real>(n),  a.take<Real>(n),
           a.take<Real>(n), a.take<double>(b), a.take<double>(b)};
    return out;
  }
  Partials(Arena& a, const DenseGeometry& g, i64 batch, i64 count)
      : parts(carve(a, g, batch, count)), padded(g.padded_batch) {
    for (ForwardPartial& p : parts) {
      std::fill_n(static_cast<Real*>(p.row_max), padded, std::numeric_limits<Real>::lowest());
      for (void* v : {p.row_sum, p.row_lost, p.row_aux, p.row_aux_lost})
        std::fill_n(static_cast<Real*>(v), padded, Real(0));
      for (double* v : {p.output, p.adjust}) std::fill_n(v, batch, 0.0);
    }
  }
  double lse(i64 b) const {
    double top = std::numeric_limits<double>::lowest(), sum = 0;
    for (const ForwardPartial& p : parts) top = std::max(top, static_cast<double>(static_cast<Real*>(p.row_max)[b]));
    for (const ForwardPartial& p : parts) {
      const double s = static_cast<double>(static_cast<Real*>(p.row_sum)[b]) -
                       static_cast<double>(static_cast<Real*>(p.row_lost)[b]);
      sum += s * std::exp(static_cast<double>(static_cast<Real*>(p.row_max)[b]) - top);
    }
    return top + std::log(sum);
  }
  double aux(i64 b) const {
    double sum = 0;
    for (const ForwardPartial& p : parts)
      sum += static_cast<double>(static_cast<Real*>(p.row_aux)[b]) -
             static_cast<double>(static_cast<Real*>(p.row_aux_lost)[b]);
    return sum;
  }
  double output(i64 b) const {
    double sum = 0;
    for (const ForwardPartial& p : parts) sum += p.output[b];
    return sum;
  }
  double adjust(i64 b) const {
    double sum = 0;
    for (const ForwardPartial& p : parts) sum += p.adjust[b];
    return sum;
  }
};

inline void put(const AnyVector& v, i64 i, double x) {
  if (!v) return;
  if (v.dtype == Dtype::f64) {
    static_cast<double*>(v.data)[i] = x;
  } else {
    static_cast<float*>(v.data)[i] = static_cast<float>(x);
  }
}

// Losses and outputs of every example from the sums over the classes.
template <class Real>
void finish_losses(const Prepared& in, const LossOptions& loss, const Partials<Real>& sums, AnyVector losses,
                   AnyVector output, AnyVector lse_out) {
  for (std::size_t i = 0; i < in.rows.size(); ++i) {
    const auto b = static_cast<i64>(i);
    const RowTargets& row = in.rows[i];
    double value = 0, out = 0;
    if (loss.kind == Loss::softmax) {
      const double lse = sums.lse(b), a = loss.label_smoothing, even = a / static_cast<double>(in.n_classes);
      put(lse_out, b, lse);
      if (row.active && in.part) {
        value = -(1 - a) * sums.adjust(b);
        if (a > 0) value -= even * sums.aux(b);
        out = sums.output(b);
      } else if (row.active) {
        value = (1 - a) * (row.weighted * lse - sums.adjust(b)) + loss.lse_penalty * lse * lse;
        if (a > 0) value += even * (in.class_weight_sum * lse - sums.aux(b));
        out = sums.output(b) - row.total * lse;
      }
    } else if (row.active) {
      value = sums.aux(b) + sums.adjust(b);
      out = sums.output(b);
    }
    put(losses, b, value);
    put(output, b, out);
  }
}

inline void pack(const HeadKernels& k, const DenseContext& ctx, const DenseGeometry& g, bool rows) {
  parallel_for(rows ? 2 * g.blocks : g.blocks, [&](i64 i) {
    if (i < g.blocks) {
      k.pack_columns(ctx, g, i);
    } else {
      k.pack_rows(ctx, g, i - g.blocks);
    }
  });
}

// Context of a call that only reads: hidden packed, no targets unless `in` has some.
template <class Layer>
DenseContext reading_context(const Layer& layer, const LossOptions& loss, const Prepared& in, const DenseGeometry& g,
                             Arena& a) {
  DenseContext ctx = layer_context(layer, loss);
  if (ctx.loss.class_weight) ctx.loss.class_weight += in.first_class;
  ctx.entries = in.entries.data();
  ctx.n_entries = static_cast<i64>(in.entries.size());
  ctx.entry_logits = a.bytes(in.entries.size() * static_cast<std::size_t>(g.real_bytes));
  ctx.packed_columns = a.bytes(g.columns_bytes);
  return ctx;
}

template <class Real, class Args>
void forward_as(const Args& args, const HeadKernels& k) {
  const auto& layer = args.layer;
  const i64 batch = layer.hidden.rows, classes = layer.weight.rows;
  const Prepared in(args.target, args.loss, classes);
  const DenseGeometry g = k.geometry(layer_context(layer, args.loss));
  const Partition parts = partition(g, classes, Partials<Real>::size(g, batch, 1));
  const auto entry_bytes = in.entries.size() * sizeof(Real);
  Arena a(workspace(Slot::call, Partials<Real>::size(g, batch, parts.count) + g.columns_bytes + entry_bytes + 256));
  const DenseContext ctx = reading_context(layer, args.loss, in, g, a);
  Partials<Real> sums(a, g, batch, parts.count);
  pack(k, ctx, g, false);
  parallel_for(parts.count, [&](i64 p) {
    k.forward(ctx, g, parts.first(p), parts.first(p + 1), sums.parts[static_cast<std::size_t>(p)],
              workspace(Slot::task, g.forward_scratch));
  });
  finish_losses(in, args.loss, sums, args.losses, args.output, args.lse);
}

template <class Real>
void store_grad_hidden(const DenseGeometry& g, const std::vector<void*>& partials, AnyMatrix out) {
  const i64 width = (out.cols + g.panel - 1) / g.panel * g.panel;
  const auto place = [&](i64 b, i64 c) {
    if (g.feature_major) return (b / g.panel * out.cols + c) * g.panel + b % g.panel;
    const i64 block = b / g.block, rows = std::min(g.block, g.padded_batch - block * g.block);
    return block * g.block * width + (c / g.panel * rows + b % g.block) * g.panel + c % g.panel;
  };
  const auto sum_to = [&](i64 b, i64 c) {
    const i64 at = place(b, c), to = b * out.stride + c;
    Real sum = static_cast<Real*>(partials[0])[at];
    for (std::size_t p = 1; p < partials.size(); ++p) sum += static_cast<Real*>(partials[p])[at];
    switch (out.dtype) {
      case Dtype::f64: static_cast<double*>(out.data)[to] = static_cast<double>(sum); break;
      case Dtype::f32: static_cast<float*>(out.data)[to] = static_cast<float>(sum); break;
      case Dtype::bf16: static_cast<std::uint16_t*>(out.data)[to] = bf16_nearest(static_cast<float>(sum)); break;
      default: static_cast<std::uint16_t*>(out.data)[to] = f16_nearest(static_cast<float>(sum));
    }
  };
  // Sixteen examples by 256 features: whole cache lines on both sides, whichever way the accumulators lie.
  constexpr i64 kRows = 16, kColumns = 256;
  const i64 across = (out.cols + kColumns - 1) / kColumns;
  parallel_for((out.rows + kRows - 1) / kRows * across, [&](i64 chunk) {
    const i64 b0 = chunk / across * kRows, c0 = chunk % across * kColumns;
    for (i64 b = b0; b < std::min(out.rows, b0 + kRows); ++b)
      for (i64 c = c0; c < std::min(out.cols, c0 + kColumns); ++c) sum_to(b, c);
  });
}

// Per-example factors of the gradient, padded so that the lanes beyond the batch stay finite and zero.
template <class Real, class Args>
void fill_scales(const Args& args, const Prepared& in, const DenseGeometry& g, Real* lse, Real* p_scale,
                 Real* e_scale) {
  const LossOptions& loss = args.loss;
  const double a = loss.label_smoothing, classes = static_cast<double>(in.n_classes);
  for (i64 b = 0; b < g.padded_batch; ++b) {
    lse[b] = Real(1e30);
    p_scale[b] = e_scale[b] = 0;
    if (b >= args.layer.hidden.rows) continue;
    const auto i = static_cast<std::size_t>(b);
    const RowTargets& row = in.rows[i];
    if (loss.kind != Loss::softmax) {
      p_scale[b] = static_cast<Real>(in.grad_losses[i]);
      continue;
    }
    const double z = element(args.lse, b);
    double p = element(args.grad_lse, b);
    if (row.active) {
      p += in.grad_losses[i] * ((1 - a) * row.weighted + a * in.class_weight_sum / classes + 2 * loss.lse_penalty * z);
      p -= in.grad_output[i] * row.total;
      e_scale[b] = static_cast<Real>(in.grad_losses[i] * a / classes);
    }
    lse[b] = static_cast<Real>(z);
    p_scale[b] = static_cast<Real>(p);
  }
}

template <class Real, class Args>
class Backward {
 public:
  Backward(const Args& args, const HeadKernels& k)
      : args_(args),
        k_(k),
        batch_(args.layer.hidden.rows),
        in_(args.target, args.loss, args.layer.weight.rows),
        g_(k.geometry(layer_context(args.layer, args.loss))),
        parts_(partition(g_, args.layer.weight.rows, args.grad_hidden ? g_.grad_bytes : 0)) {
    in_.take_gradients(args.grad_losses, args.grad_output);
  }

  void run() {
    const bool by_batch = !g_.feature_major && args_.grad_hidden && parts_.count > 1 &&
                          static_cast<std::size_t>(parts_.count) * g_.grad_bytes > g_.partial_bytes;
    const i64 accumulators = !args_.grad_hidden ? 0 : by_batch ? 1 : parts_.count;
    const auto n = static_cast<std::size_t>(g_.padded_batch);
    const bool losses = args_.losses || args_.output;
    std::size_t bytes =
        in_.entries.size() * sizeof(Real) + g_.columns_bytes + g_.rows_bytes + 3 * n * sizeof(Real) + 1024;
    bytes += static_cast<std::size_t>(accumulators) * (g_.grad_bytes + 64);
    if (losses) bytes += Partials<Real>::size(g_, batch_, parts_.count);
    Arena a(workspace(Slot::call, bytes));
    ctx_ = reading_context(args_.layer, args_.loss, in_, g_, a);
    ctx_.packed_rows = a.bytes(g_.rows_bytes);
    Real *lse = a.take<Real>(n), *p_scale = a.take<Real>(n), *e_scale = a.take<Real>(n);
    fill_scales<Real>(args_, in_, g_, lse, p_scale, e_scale);
    ctx_.lse = lse;
    ctx_.p_scale = p_scale;
    ctx_.e_scale = e_scale;
    ctx_.grad_losses = in_.grad_losses.data();
    ctx_.grad_output = in_.grad_output.data();
    if constexpr (requires { args_.filter_eps; })
      ctx_.filter_below = args_.loss.kind == Loss::softmax ? args_.filter_eps * in_.largest_grad_loss() : 0;
    std::vector<void*> grads(static_cast<std::size_t>(accumulators));
    for (void*& grad : grads) grad = a.bytes(g_.grad_bytes);
    pack(k_, ctx_, g_, true);
    if (losses) {
      Partials<Real> sums(a, g_, batch_, parts_.count);
      by_batch ? walk_batch(grads[0], &sums) : walk_classes(grads, &sums);
      finish_losses(in_, args_.loss, sums, args_.losses, args_.output, {});
    } else {
      by_batch ? walk_batch(grads[0], nullptr) : walk_classes(grads, nullptr);
    }
    if (args_.grad_hidden) store_grad_hidden<Real>(g_, grads, args_.grad_hidden);
    if constexpr (requires { args_.filtered; })
      if (args_.filtered) *args_.filtered = filtered_;
  }

 private:
  BackwardTask task(i64 p, Partials<Real>* sums) const {
    BackwardTask t{};
    t.first_tile = parts_.first(p);
    t.end_tile = parts_.first(p + 1);
    t.end_block = g_.blocks;
    t.grad_weight = args_.grad_weight;
    t.grad_bias = args_.grad_bias;
    t.update = args_.update;
    t.want_weight = args_.grad_weight || args_.update;
    t.losses = sums ? &sums->parts[static_cast<std::size_t>(p)] : nullptr;
    return t;
  }

  // One pass: each partition has a dH of its own.
  void walk_classes(const std::vector<void*>& grads, Partials<Real>* sums) {
    parallel_for(parts_.count, [&](i64 p) {
      BackwardTask t = task(p, sums);
      if (!grads.empty()) {
        t.grad_hidden = grads[static_cast<std::size_t>(p)];
        std::fill_n(static_cast<char*>(t.grad_hidden), g_.grad_bytes, char{0});
      }
      k_.backward(ctx_, g_, t, workspace(Slot::task, g_.backward_scratch));
      filtered_ += t.filtered;
    });
  }

  // Large batches: dH block by block over all classes first, then the weights; one more product, no partial dH.
  void walk_batch(void* grad, Partials<Real>* sums) {
    std::fill_n(static_cast<char*>(grad), g_.grad_bytes, char{0});
    parallel_for(g_.blocks, [&](i64 block) {
      BackwardTask t{};
      t.end_tile = parts_.tiles;
      t.first_block = block;
      t.end_block = block + 1;
      t.grad_hidden = grad;
      k_.backward(ctx_, g_, t, workspace(Slot::task, g_.backward_scratch));
    });
    parallel_for(parts_.count, [&](i64 p) {
      BackwardTask t = task(p, sums);
      k_.backward(ctx_, g_, t, workspace(Slot::task, g_.backward_scratch));
      filtered_ += t.filtered;
    });
  }

  const Args& args_;
  const HeadKernels& k_;
  i64 batch_;
  Prepared in_;
  DenseGeometry g_;
  Partition parts_;
  DenseContext ctx_{};
  std::atomic<i64> filtered_{0};
};

template <class Real, class Args>
void topk_as(const Args& args, const LossOptions& loss, const HeadKernels& k) {
  const auto& layer = args.layer;
  const i64 batch = layer.hidden.rows, classes = layer.weight.rows, width = std::min(args.k, classes);
  const Prepared in;
  const DenseGeometry g = k.geometry(layer_context(layer, loss));
  const auto cells = static_cast<std::size_t>(batch * width);
  const Partition parts = partition(g, classes, cells * (sizeof(Real) + sizeof(i64)));
  const std::size_t lists =
      static_cast<std::size_t>(parts.count) * (cells * (sizeof(Real) + 8) + static_cast<std::size_t>(batch) * 8 + 256);
  Arena a(workspace(Slot::call,
                    g.columns_bytes + lists + 256 + (args.lse ? Partials<Real>::size(g, batch, parts.count) : 0)));
  const DenseContext ctx = reading_context(layer, loss, in, g, a);
  const std::vector<i64> exclude = sorted_rows(args.exclude_indptr, args.exclude_indices, batch);
  std::vector<TopKTask> tasks(static_cast<std::size_t>(parts.count));
  std::unique_ptr<Partials<Real>> sums;
  if (args.lse) sums = std::make_unique<Partials<Real>>(a, g, batch, parts.count);
  for (std::size_t p = 0; p < tasks.size(); ++p) {
    const auto part = static_cast<i64>(p);
    tasks[p] = {parts.first(part),   parts.first(part + 1), width,
                a.take<Real>(cells), a.take<i64>(cells),    a.take<i64>(static_cast<std::size_t>(batch)),
                args.exclude_indptr, exclude.data(),        sums ? &sums->parts[p] : nullptr};
    std::fill_n(tasks[p].filled, batch, i64{0});
  }
  pack(k, ctx, g, false);
  parallel_for(parts.count, [&](i64 p) {
    k.topk(ctx, g, tasks[static_cast<std::size_t>(p)], workspace(Slot::task, g.forward_scratch));
  });
  for (i64 b = 0; b < batch; ++b) {
    std::vector<Real> scores(static_cast<std::size_t>(args.k), -std::numeric_limits<Real>::infinity());
    TopK<Real> best{scores.data(), args.classes.data + b * args.classes.stride, args.k};
    std::fill_n(best.classes, args.k, i64{-1});
    for (const TopKTask& t : tasks)
      for (i64 i = 0; i < t.filled[b]; ++i)
        best.push(static_cast<Real*>(t.scores)[b * width + i], t.classes[b * width + i]);
    for (i64 i = 0; i < args.k; ++i) {
      const auto x = static_cast<double>(scores[static_cast<std::size_t>(i)]);
      put({static_cast<char*>(args.scores.data) + b * args.scores.stride * size_of(args.scores.dtype),
           args.scores.dtype, args.k},
          i, x);
    }
    if (args.lse) put(args.lse, b, sums->lse(b));
  }
}

template <class Args>
void logits_as(const Args& args, const LossOptions& loss, const HeadKernels& k) {
  const auto& layer = args.layer;
  const Prepared in;
  const DenseGeometry g = k.geometry(layer_context(layer, loss));
  const Partition parts = partition(g, layer.weight.rows, 0);
  Arena a(workspace(Slot::call, g.columns_bytes + 256));
  const DenseContext ctx = reading_context(layer, loss, in, g, a);
  pack(k, ctx, g, false);
  parallel_for(parts.count, [&](i64 p) {
    k.logits(ctx, g, parts.first(p), parts.first(p + 1), args.logits, workspace(Slot::task, g.forward_scratch));
  });
}

template <class Args>
void scores_as(const Args& args, const LossOptions& loss, const HeadKernels& k) {
  const DenseContext ctx = layer_context(args.layer, loss);
  constexpr i64 kRows = 8;
  const i64 batch = args.layer.hidden.rows;
  parallel_for((batch + kRows - 1) / kRows, [&](i64 chunk) {
    k.scores(ctx, chunk * kRows, std::min(batch, (chunk + 1) * kRows), args.classes, args.n, args.scores);
  });
}

// Calls f with a number of the type that goes with the weights.
template <class Layer, class F>
void by_real(const Layer& layer, F f) {
  if (layer.weight.dtype == Dtype::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace widehead::cpu
