// dense-tile-inl.h -- geometry, packing and the three products of one tile of classes
//
// A tile is C classes of W, packed once in cache as panels; Z and G are its logits and their gradient, [batch panel][C][PW].
//   Z  = W_tile  H^T      rows of W broadcast, batch in the lanes: maxima and sums are vertical
//   dH += G^T W_tile      columns of G broadcast, features in the lanes
//   dW = G H              rows of G broadcast, features in the lanes
#pragma once
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "widehead/random.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// Shapes that follow from the mode, the batch and the features.
template <class M>
struct Shape {
  using Real = typename M::Real;
  using Elem = typename M::Elem;
  static constexpr i64 kP = kPanel<Real>;
  static constexpr i64 kBlock = 256;  // examples a block: G of a tile stays near 100 KB

  i64 batch, features;
  i64 depth;           // Elems along the features
  i64 weight_panels;   // panels of a packed row of W
  i64 feature_panels;  // panels of dH and dW

  Shape(i64 b, i64 d)
      : batch(b),
        features(d),
        depth(ceil_div(d, M::kPack)),
        weight_panels(ceil_div(depth, kP)),
        feature_panels(ceil_div(d, kP)) {}

  i64 padded_batch() const { return round_up(batch, kP * M::kPack); }
  i64 block_rows(i64 block) const { return at_most(kBlock, padded_batch() - block * kBlock); }  // padded
  i64 block_batch(i64 block) const { return at_most(kBlock, batch - block * kBlock); }          // real
  // The packed weights take a quarter of a megabyte at most, so that they, G and dW share the L2 cache.
  i64 tile(i64 classes) const {
    const i64 fit = (i64{1} << 18) / (weight_panels * kP * static_cast<i64>(sizeof(Elem)));
    const i64 c = fit >= 96 ? 96 : fit <= 24 ? 24 : fit / 12 * 12;
    return at_most(c, round_up(classes, kRowStep));
  }
  int vectors(i64 columns_left) const { return columns_left > Simd<Real>::kLanes ? 2 : 1; }
};

template <class M>
DenseGeometry geometry_as(const DenseContext& ctx) {
  using S = Shape<M>;
  const S s(ctx.batch, ctx.features);
  DenseGeometry g{};
  constexpr std::size_t kElem = sizeof(typename M::Elem), kReal = sizeof(typename M::Real);
  const auto size = [](i64 n) { return static_cast<std::size_t>(n); };
  g.panel = S::kP;
  g.partial_bytes = std::size_t{32} << 20;
  g.tile = s.tile(ctx.classes);
  g.block = S::kBlock;
  g.padded_batch = s.padded_batch();
  g.blocks = ceil_div(g.padded_batch, S::kBlock);
  g.real_bytes = kReal;
  g.columns_bytes = size(g.padded_batch * s.depth) * kElem;
  g.rows_bytes = size(g.padded_batch / M::kPack * s.feature_panels * S::kP) * kElem;
  g.grad_bytes = size(g.padded_batch * s.feature_panels * S::kP) * kReal;
  const std::size_t weights = size(g.tile * s.weight_panels * S::kP) * kElem;
  const std::size_t per_class = size(4 * g.tile) * kReal;
  g.forward_scratch = weights + size(g.tile * S::kP) * kReal + per_class + 1024;
  const i64 block = at_most(S::kBlock, g.padded_batch);
  g.backward_scratch =
      weights + size(g.tile * block) * kReal + per_class + size((g.tile + 1) * s.feature_panels * S::kP) * kReal + 1024;
  if (M::kPack == 2)
    g.backward_scratch += size(g.tile * s.feature_panels * S::kP + g.tile * S::kP + g.tile * block) * 2 + 512;
  return g;
}

// Hands out cache-line aligned pieces of a task's scratch.
struct Carve {
  char* p;
  template <class T>
  T* take(i64 n) {
    T* r = reinterpret_cast<T*>(p);
    p += round_up(n * static_cast<i64>(sizeof(T)), 64);
    return r;
  }
};

// Row `b` of hidden as Real, rounded to bfloat16 where the weights are.
template <class M>
void read_hidden(const DenseContext& ctx, i64 b, typename M::Real* out) {
  using Real = typename M::Real;
  const i64 d = ctx.features, at = b * ctx.hidden_stride;
  switch (ctx.hidden_dtype) {
    case Dtype::f64:
      for (i64 k = 0; k < d; ++k) out[k] = static_cast<Real>(static_cast<const double*>(ctx.hidden)[at + k]);
      break;
    case Dtype::bf16:
      for (i64 k = 0; k < d; ++k)
        out[k] = static_cast<Real>(bf16_float(static_cast<const uint16_t*>(ctx.hidden)[at + k]));
      break;
    case Dtype::f16:
      for (i64 k = 0; k < d; ++k)
        out[k] = static_cast<Real>(f16_float(static_cast<const uint16_t*>(ctx.hidden)[at + k]));
      break;
    default:
      for (i64 k = 0; k < d; ++k) out[k] = static_cast<Real>(static_cast<const float*>(ctx.hidden)[at + k]);
  }
  if (sizeof(typename M::Weight) == 2)
    for (i64 k = 0; k < d; ++k) out[k] = static_cast<Real>(bf16_float(bf16_nearest(static_cast<float>(out[k]))));
}

// Puts x into slot `half` of an Elem.
template <class M>
WIDEHEAD_INLINE void put(typename M::Elem* e, int half, typename M::Real x) {
  if constexpr (M::kPack == 2) {
    reinterpret_cast<uint16_t*>(e)[half] = static_cast<uint16_t>(float_bits(x) >> 16);
  } else {
    *e = x;
  }
}

template <class M>
void pack_columns(const DenseContext& ctx, const DenseGeometry&, i64 block) {
  using S = Shape<M>;
  const S s(ctx.batch, ctx.features);
  auto* out = static_cast<typename M::Elem*>(ctx.packed_columns) + block * S::kBlock * s.depth;
  __builtin_memset(out, 0, static_cast<std::size_t>(s.block_rows(block) * s.depth) * sizeof(typename M::Elem));
  auto* row =
      static_cast<typename M::Real*>(__builtin_malloc(static_cast<std::size_t>(s.features) * sizeof(typename M::Real)));
  for (i64 b = 0; b < s.block_batch(block); ++b) {
    read_hidden<M>(ctx, block * S::kBlock + b, row);
    auto* column = out + b / S::kP * S::kP * s.depth + b % S::kP;
    for (i64 k = 0; k < s.features; ++k) put<M>(column + k / M::kPack * S::kP, static_cast<int>(k % M::kPack), row[k]);
  }
  __builtin_free(row);
}

template <class M>
void pack_rows(const DenseContext& ctx, const DenseGeometry&, i64 block) {
  using S = Shape<M>;
  const S s(ctx.batch, ctx.features);
  const i64 width = s.feature_panels * S::kP, depth = s.block_rows(block) / M::kPack;
  auto* out = static_cast<typename M::Elem*>(ctx.packed_rows) + block * S::kBlock / M::kPack * width;
  __builtin_memset(out, 0, static_cast<std::size_t>(depth * width) * sizeof(typename M::Elem));
  auto* row =
      static_cast<typename M::Real*>(__builtin_malloc(static_cast<std::size_t>(s.features) * sizeof(typename M::Real)));
  for (i64 b = 0; b < s.block_batch(block); ++b) {
    read_hidden<M>(ctx, block * S::kBlock + b, row);
    for (i64 k = 0; k < s.features; ++k)
      put<M>(out + (k / S::kP * depth + b / M::kPack) * S::kP + k % S::kP, static_cast<int>(b % M::kPack), row[k]);
  }
  __builtin_free(row);
}

// One tile of classes and its packed rows.
template <class M>
struct Tile {
  using Real = typename M::Real;
  using Elem = typename M::Elem;
  static constexpr i64 kP = kPanel<Real>;
  i64 first, count, padded;  // classes; padded to kRowStep
  Elem* weight;              // [weight panel][padded][PW]
  Elem* weight_rows;  // [feature panel][padded / pack][PW]: the right-hand side of dH; the same memory where pack is 1
  Real* add;          // [count] bias + offset
  Real* bias;         // [count]
  const Entry* entries;
  i64 n_entries;
  Real* entry_logits;
  Prefetch prefetch;  // of the next tile's rows of W
};

template <class M>
WIDEHEAD_INLINE void copy_panel(const typename M::Weight* w, typename M::Elem* out, i64 elems) {
  constexpr i64 kP = kPanel<typename M::Real>, kLanes = kP / 2;
  if constexpr (M::kPack == 2) {
    __builtin_memcpy(out, w, static_cast<std::size_t>(elems) * 2);
    if (elems < 2 * kP)
      __builtin_memset(reinterpret_cast<uint16_t*>(out) + elems, 0, static_cast<std::size_t>(2 * kP - elems) * 2);
  } else if (elems >= kP) {
    for (int v = 0; v < 2; ++v) {
      if constexpr (sizeof(typename M::Weight) == 2) {
        store(out + v * kLanes, load_bf16(w + v * kLanes));
      } else {
        store(out + v * kLanes, load(w + v * kLanes));
      }
    }
  } else {
    for (i64 k = 0; k < kP; ++k) {
      if constexpr (sizeof(typename M::Weight) == 2) {
        out[k] = k < elems ? bf16_float(w[k]) : 0.0f;
      } else {
        out[k] = k < elems ? w[k] : 0;
      }
    }
  }
}

template <class M>
void pack_weights(const DenseContext& ctx, const Shape<M>& s, Tile<M>& t) {
  constexpr i64 kP = Tile<M>::kP, kStep = kP * M::kPack;
  const i64 outer = t.padded * kP;
  const auto* w = static_cast<const typename M::Weight*>(ctx.weight) + t.first * ctx.weight_stride;
  for (i64 c = 0; c < t.padded; ++c) {
    typename M::Elem* out = t.weight + c * kP;
    for (i64 p = 0; p < s.weight_panels; ++p, out += outer) {
      if (c < t.count) {
        copy_panel<M>(w + c * ctx.weight_stride + p * kStep, out, at_most(kStep, s.features - p * kStep));
      } else {
        __builtin_memset(out, 0, sizeof(typename M::Elem) * kP);
      }
    }
  }
}

#ifdef WIDEHEAD_BF16_DOT
// Rows c and c + 1 interleaved, for dot products that run along the classes.
inline void pack_weight_rows(const Shape<ModeBf16Dot>& s, Tile<ModeBf16Dot>& t) {
  constexpr i64 kP = Tile<ModeBf16Dot>::kP, kLanes = kP / 2;
  for (i64 f = 0; f < s.feature_panels; ++f) {
    const auto* in = reinterpret_cast<const uint16_t*>(t.weight + f / 2 * t.padded * kP) + f % 2 * kP;
    uint32_t* out = t.weight_rows + f * (t.padded / 2) * kP;
    for (i64 c = 0; c < t.padded; c += 2, in += 4 * kP, out += kP)
      for (int v = 0; v < 2; ++v) {
        const Words pair = load_words(in + v * kLanes) | load_words(in + 2 * kP + v * kLanes) << 16;
        __builtin_memcpy(out + v * kLanes, &pair, sizeof pair);
      }
  }
}
#endif

// Spreads the next tile's rows over the panels of this tile's logits.
template <class M>
Prefetch prefetch_after(const DenseContext& ctx, const Shape<M>& s, const Tile<M>& t, i64 examples) {
  const i64 rows = at_most(t.count, ctx.classes - t.first - t.count);
  if (rows <= 0) return {};
  const auto* next = static_cast<const char*>(ctx.weight) +
                     (t.first + t.count) * ctx.weight_stride * static_cast<i64>(sizeof(typename M::Weight));
  const i64 bytes = rows * ctx.weight_stride * static_cast<i64>(sizeof(typename M::Weight));
  const i64 pulls = ceil_div(examples, Tile<M>::kP) * ceil_div(t.padded, kMaxRows) * (s.depth / Tile<M>::kP);
  return {next, next + bytes, pulls > 0 ? ceil_div(bytes / 64 + 1, pulls) : 0};
}

template <class Real>
WIDEHEAD_INLINE Real bias_of(const DenseContext& ctx, i64 c) {
  return ctx.bias_dtype == Dtype::f32   ? static_cast<Real>(static_cast<const float*>(ctx.bias)[c])
         : ctx.bias_dtype == Dtype::f64 ? static_cast<Real>(static_cast<const double*>(ctx.bias)[c])
                                        : static_cast<Real>(bf16_float(static_cast<const uint16_t*>(ctx.bias)[c]));
}

// The tile's classes, their bias and their targets.
template <class M>
void place_tile(const DenseContext& ctx, Tile<M>& t, i64 tile, i64 index) {
  using Real = typename M::Real;
  t.first = index * tile;
  t.count = at_most(tile, ctx.classes - t.first);
  t.padded = round_up(t.count, kRowStep);
  for (i64 c = 0; c < t.count; ++c) {
    const Real b = ctx.bias ? bias_of<Real>(ctx, t.first + c) : Real{0};
    t.bias[c] = b;
    t.add[c] = ctx.offset ? b + static_cast<Real>(ctx.offset[t.first + c]) : b;
  }
  const auto first_entry = [&](i64 cls) {
    i64 lo = 0, hi = ctx.n_entries;
    while (lo < hi) {
      const i64 mid = (lo + hi) / 2;
      if (ctx.entries[mid].cls < cls) {
        lo = mid + 1;
      } else {
        hi = mid;
      }
    }
    return lo;
  };
  const i64 lo = first_entry(t.first);
  t.entries = ctx.entries + lo;
  t.n_entries = first_entry(t.first + t.count) - lo;
  t.entry_logits = static_cast<Real*>(ctx.entry_logits) + lo;
}

template <class M>
void begin_tile(const DenseContext& ctx, const Shape<M>& s, Tile<M>& t, i64 tile, i64 index, i64 examples) {
  place_tile<M>(ctx, t, tile, index);
  pack_weights<M>(ctx, s, t);
  t.prefetch = prefetch_after<M>(ctx, s, t, examples);
}

// Z panel of 32 (AVX-512) examples.
template <class M>
WIDEHEAD_INLINE void tile_logits(const DenseContext& ctx, const Shape<M>& s, Tile<M>& t, i64 block, i64 panel,
                                 typename M::Real* z, int vectors) {
  constexpr i64 kP = Tile<M>::kP;
  const auto* columns =
      static_cast<const typename M::Elem*>(ctx.packed_columns) + (block * Shape<M>::kBlock + panel * kP) * s.depth;
  gemm_panel<M, Order::rows>(t.weight, t.padded * kP, t.padded, columns, s.depth, z, false, vectors, t.prefetch);
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
