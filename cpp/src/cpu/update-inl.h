// update-inl.h -- optimiser steps on rows of a weight matrix, for every head
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "update_math.h"
#include "widehead/random.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// x . y in float64, by eight partial sums that the compiler can keep in vector registers.
template <class Real>
double dot_f64(const Real* __restrict__ x, const Real* __restrict__ y, i64 n) {
  double part[8] = {};
  i64 j = 0;
  for (; j + 8 <= n; j += 8)
    for (int i = 0; i < 8; ++i) part[i] += static_cast<double>(x[j + i]) * static_cast<double>(y[j + i]);
  for (; j < n; ++j) part[j & 7] += static_cast<double>(x[j]) * static_cast<double>(y[j]);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// Adagrad with one accumulator a row: returns lr / (sqrt(sum of mean squares) + eps).
template <class Real>
Real adagrad_scale(const UpdateScalars<Real>& s, const Real* g, i64 n, Real* state) {
  *state += static_cast<Real>(dot_f64(g, g, n) / static_cast<double>(n));
  return static_cast<Real>(static_cast<double>(s.lr) /
                           (__builtin_sqrt(static_cast<double>(*state)) + static_cast<double>(s.eps)));
}

template <Optimizer kKind, bool kMoments, class Real>
void step_row(const UpdateScalars<Real>& s, Real* __restrict__ w, const Real* __restrict__ g, Real* __restrict__ m,
              Real* __restrict__ v, Real row_scale, i64 n) {
  for (i64 j = 0; j < n; ++j)
    w[j] = stepped<Real>(s, kKind, w[j], g[j], kMoments ? m + j : nullptr, kKind == Optimizer::adam ? v + j : nullptr,
                         row_scale);
}

template <class Real>
void step_any(const Update& u, const UpdateScalars<Real>& s, Real* w, const Real* g, Real* m, Real* v, Real row_scale,
              i64 n) {
  if (u.optimizer == Optimizer::adam) return step_row<Optimizer::adam, true>(s, w, g, m, v, row_scale, n);
  if (u.optimizer == Optimizer::adagrad) return step_row<Optimizer::adagrad, false>(s, w, g, m, v, row_scale, n);
  if (m) return step_row<Optimizer::sgd, true>(s, w, g, m, v, row_scale, n);
  step_row<Optimizer::sgd, false>(s, w, g, m, v, row_scale, n);
}

// A Philox block of eight sixteen-bit random numbers a lane, for column block `block` of row `row`; laid out in the lanes'
// order. Equal to RandomStream::bits16, which the tests hold it to.
WIDEHEAD_INLINE void random_blocks(const RandomStream& stream, Words block, Words row_low, Words row_high,
                                   uint16_t* out) {
  uint32_t k0 = stream.key0(), k1 = stream.key1();
  Words c0 = block, c1 = row_low, c2 = row_high, c3 = splat(static_cast<uint32_t>(stream.step));
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Words high0, low0, high2, low2;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
  }
  Words even_low, even_high, odd_low, odd_high, w[4];
  interleave(c0, c2, even_low, even_high);
  interleave(c1, c3, odd_low, odd_high);
  interleave(even_low, odd_low, w[0], w[1]);
  interleave(even_high, odd_high, w[2], w[3]);
  __builtin_memcpy(out, w, sizeof w);
}

// For columns [0, 8 * lanes) of a row past `first_block` blocks.
inline void random_halves(const RandomStream& stream, uint64_t row, uint32_t first_block, uint16_t* out) {
  Words block;
  for (int i = 0; i < Simd<float>::kLanes; ++i) block[i] = first_block + static_cast<uint32_t>(i);
  random_blocks(stream, block, splat(static_cast<uint32_t>(row)), splat(static_cast<uint32_t>(row >> 32)), out);
}

// For `rows` short rows, [rows][8 * blocks]; `out` has room for whole vectors of blocks.
inline void random_rows(const RandomStream& stream, uint64_t first_row, i64 rows, i64 blocks, uint16_t* out) {
  constexpr i64 kLanes = Simd<float>::kLanes;
  uint64_t row = first_row;
  uint32_t block = 0;
  for (i64 p = 0; p < rows * blocks; p += kLanes) {
    Words column, low, high;
    for (int i = 0; i < kLanes; ++i) {
      column[i] = block;
      low[i] = static_cast<uint32_t>(row);
      high[i] = static_cast<uint32_t>(row >> 32);
      if (++block == static_cast<uint32_t>(blocks)) {
        block = 0;
        ++row;
      }
    }
    random_blocks(stream, column, low, high, out + p * 8);
  }
}

WIDEHEAD_INLINE Words stochastic_bits(Vec<float> x, Words random16) {
  const Words u = (Words)x;
  const Words special = (Words)((u & 0x7F800000u) == 0x7F800000u);
  return (special & bf16_bits(x)) | (~special & ((u + random16) >> 16));
}

inline void round_stochastic(const RandomStream& stream, uint64_t row, i64 first_col, const float* x, uint16_t* out,
                             i64 n) {
  constexpr i64 kLanes = Simd<float>::kLanes, kColumns = 8 * kLanes;
  i64 j = 0;
  for (; j < n && ((first_col + j) & 7); ++j)
    out[j] = bf16_stochastic(x[j], stream.bits16(row, static_cast<uint64_t>(first_col + j)));
  alignas(64) uint16_t bits[kColumns];
  for (; j < n; j += kColumns) {
    random_halves(stream, row, static_cast<uint32_t>((first_col + j) >> 3), bits);
    const i64 len = n - j < kColumns ? n - j : kColumns;
    i64 i = 0;
    for (; i + kLanes <= len; i += kLanes)
      store_halves(out + j + i, stochastic_bits(load(x + j + i), load_words(bits + i)));
    for (; i < len; ++i) out[j + i] = bf16_stochastic(x[j + i], bits[i]);
  }
}

// Kahan: what rounding loses now is added back before the next step.
inline void round_kahan(const float* x, uint16_t* lost, uint16_t* out, i64 n) {
  for (i64 j = 0; j < n; ++j) {
    const float want = bf16_float(lost[j]) + x[j];
    out[j] = bf16_nearest(want);
    lost[j] = bf16_nearest(want - bf16_float(out[j]));
  }
}

inline void widen(const uint16_t* w, float* x, i64 n) {
  constexpr i64 kLanes = Simd<float>::kLanes;
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load_bf16(w + i));
  for (; i < n; ++i) x[i] = bf16_float(w[i]);
}

// `n` bfloat16 elements from `first_col` of the random stream `row`.
inline void update_bf16(const Update& u, const UpdateScalars<float>& s, Purpose purpose, uint64_t row, i64 first_col,
                        uint16_t* w, const float* g, float* m, float* v, uint16_t* lost, float row_scale, i64 n) {
  constexpr i64 kChunk = 512;
  float x[kChunk];
  for (i64 j = 0; j < n; j += kChunk) {
    const i64 len = n - j < kChunk ? n - j : kChunk;
    widen(w + j, x, len);
    step_any<float>(u, s, x, g + j, m ? m + j : nullptr, v ? v + j : nullptr, row_scale, len);
    if (lost) {
      round_kahan(x, lost + j, w + j, len);
    } else if (u.rounding == Rounding::stochastic) {
      round_stochastic({u.seed, purpose, u.step}, row, first_col + j, x, w + j, len);
    } else {
      for (i64 i = 0; i < len; ++i) w[j + i] = bf16_nearest(x[i]);
    }
  }
}

template <class T>
T* row_of(const AnyMatrix& m, i64 row) {
  return m ? static_cast<T*>(m.data) + row * m.stride : nullptr;
}
template <class T>
T* at(const AnyVector& v, i64 i) {
  return v ? static_cast<T*>(v.data) + i : nullptr;
}

template <class Real>
void update_row_as(const Update& u, const UpdateScalars<Real>& s, AnyMatrix weight, i64 row, const Real* g) {
  Real* m = row_of<Real>(u.first, row);
  Real* v = row_of<Real>(u.second, row);
  Real row_scale = 0;
  if (u.optimizer == Optimizer::adagrad) {
    row_scale = adagrad_scale<Real>(s, g, weight.cols, v);
    v = nullptr;
  }
  if constexpr (sizeof(Real) == 4) {
    if (weight.dtype == Dtype::bf16)
      return update_bf16(u, s, Purpose::rounding_weight, static_cast<uint64_t>(u.first_row + row), 0,
                         row_of<uint16_t>(weight, row), g, m, v, row_of<uint16_t>(u.compensation, row), row_scale,
                         weight.cols);
  }
  step_any<Real>(u, s, row_of<Real>(weight, row), g, m, v, row_scale, weight.cols);
}

// Whether rows of the weights and of their state lie side by side without gaps.
inline bool gapless(const Update& u, const AnyMatrix& weight) {
  const auto fits = [&](const AnyMatrix& m) { return !m || m.stride == weight.cols; };
  return fits(weight) && fits(u.first) && fits(u.second) && fits(u.compensation);
}

// As round_stochastic, of `rows` short rows at once: a row of 32 columns alone would use a quarter of a vector of blocks.
inline void round_rows(const RandomStream& stream, uint64_t first_row, const float* x, uint16_t* out, i64 rows,
                       i64 cols) {
  constexpr i64 kLanes = Simd<float>::kLanes, kRows = 32, kMost = 64;
  alignas(64) uint16_t bits[kRows * kMost + 8 * kLanes];
  const i64 blocks = ceil_div(cols, 8), width = blocks * 8;
  for (i64 r = 0; r < rows; r += kRows) {
    const i64 n = at_most(rows - r, kRows);
    random_rows(stream, first_row + static_cast<uint64_t>(r), n, blocks, bits);
    // Without columns left over the rows are one.
    const i64 lines = width == cols ? 1 : n, length = width == cols ? n * cols : cols;
    for (i64 line = 0; line < lines; ++line) {
      const float* from = x + r * cols + line * cols;
      uint16_t *to = out + r * cols + line * cols, *random = bits + line * width;
      i64 i = 0;
      for (; i + kLanes <= length; i += kLanes)
        store_halves(to + i, stochastic_bits(load(from + i), load_words(random + i)));
      for (; i < length; ++i) to[i] = bf16_stochastic(from[i], random[i]);
    }
  }
}

// Rows [first, first + n) by gradients [n, cols]: short rows in one go.
template <class Real>
void update_rows_as(const Update& u, const UpdateScalars<Real>& s, AnyMatrix weight, i64 first, i64 n, const Real* g) {
  constexpr i64 kShort = 64, kRows = 32;
  const i64 cols = weight.cols;
  if (u.optimizer == Optimizer::adagrad || !gapless(u, weight) || cols > kShort) {
    for (i64 i = 0; i < n; ++i) update_row_as<Real>(u, s, weight, first + i, g + i * cols);
    return;
  }
  Real *m = row_of<Real>(u.first, first), *v = row_of<Real>(u.second, first);
  if (weight.dtype != Dtype::bf16) return step_any<Real>(u, s, row_of<Real>(weight, first), g, m, v, Real{0}, n * cols);
  if constexpr (sizeof(Real) == 4) {
    float x[kRows * kShort];
    for (i64 r = 0; r < n; r += kRows) {
      const i64 at = r * cols, rows = at_most(n - r, kRows), len = rows * cols;
      uint16_t* w = row_of<uint16_t>(weight, first + r);
      widen(w, x, len);
      step_any<float>(u, s, x, g + at, m ? m + at : nullptr, v ? v + at : nullptr, 0.0f, len);
      if (u.compensation) {
        round_kahan(x, row_of<uint16_t>(u.compensation, first + r), w, len);
      } else if (u.rounding == Rounding::stochastic) {
        const auto row = static_cast<uint64_t>(u.first_row + first + r);
        round_rows({u.seed, Purpose::rounding_weight, u.step}, row, x, w, rows, cols);
      } else {
        for (i64 i = 0; i < len; ++i) w[i] = bf16_nearest(x[i]);
      }
    }
  }
}

inline void update_row(const Update& u, AnyMatrix weight, i64 row, const void* g) {
  if (weight.dtype == Dtype::f64)
    return update_row_as<double>(u, UpdateScalars<double>(u), weight, row, static_cast<const double*>(g));
  update_row_as<float>(u, UpdateScalars<float>(u), weight, row, static_cast<const float*>(g));
}

// A bias is float64 exactly when the weights are. Adagrad keeps one accumulator an element: each is a row of one column.
template <class Real>
void update_bias_as(const Update& u, AnyVector bias, i64 first, i64 n, const Real* g) {
  const UpdateScalars<Real> s(u);
  Real* m = at<Real>(u.bias_first, first);
  Real* v = at<Real>(u.bias_second, first);
  constexpr i64 kChunk = 64;
  for (i64 j = 0; j < n; j += kChunk) {
    const i64 len = n - j < kChunk ? n - j : kChunk;
    Real x[kChunk];
    for (i64 i = 0; i < len; ++i) {
      const i64 e = first + j + i;
      x[i] = bias.dtype == Dtype::f64   ? static_cast<Real>(static_cast<const double*>(bias.data)[e])
             : bias.dtype == Dtype::f32 ? static_cast<Real>(static_cast<const float*>(bias.data)[e])
                                        : static_cast<Real>(bf16_float(static_cast<const uint16_t*>(bias.data)[e]));
    }
    if (u.optimizer == Optimizer::adagrad) {
      for (i64 i = 0; i < len; ++i) {
        const Real row_scale = adagrad_scale<Real>(s, g + j + i, 1, v + j + i);
        x[i] = x[i] * s.keep - row_scale * g[j + i];
      }
    } else {
      step_any<Real>(u, s, x, g + j, m ? m + j : nullptr, v ? v + j : nullptr, Real{0}, len);
    }
    for (i64 i = 0; i < len; ++i) {
      const i64 e = first + j + i;
      if (bias.dtype == Dtype::f64) {
        static_cast<double*>(bias.data)[e] = static_cast<double>(x[i]);
      } else if (bias.dtype == Dtype::f32) {
        static_cast<float*>(bias.data)[e] = static_cast<float>(x[i]);
      } else {
        const RandomStream stream{u.seed, Purpose::rounding_bias, u.step};
        static_cast<uint16_t*>(bias.data)[e] =
            u.rounding == Rounding::stochastic
                ? bf16_stochastic(static_cast<float>(x[i]), stream.bits16(static_cast<uint64_t>(u.first_row + e), 0))
                : bf16_nearest(static_cast<float>(x[i]));
      }
    }
  }
}

inline void update_bias(const Update& u, AnyVector bias, i64 first, i64 n, const void* g) {
  if (bias.dtype == Dtype::f64) return update_bias_as<double>(u, bias, first, n, static_cast<const double*>(g));
  update_bias_as<float>(u, bias, first, n, static_cast<const float*>(g));
}

inline UpdateKernels update_table() { return {update_row, update_bias}; }

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
