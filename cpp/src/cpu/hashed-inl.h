// hashed-inl.h -- rows of the weights against the examples that look at them: each row is read once, and written by one task
#pragma once
#include "cpu/bag-inl.h"
#include "cpu/hashed.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/update-inl.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

constexpr i64 kRowsAhead = 4;

template <class Real>
void read_row(const AnyMatrix& weight, i64 row, Real* out) {
  const i64 at = row * weight.stride;
  for (i64 k = 0; k < weight.cols; ++k) {
    if (weight.dtype == Dtype::bf16)
      out[k] = static_cast<Real>(bf16_float(static_cast<const uint16_t*>(weight.data)[at + k]));
    else
      out[k] = static_cast<const Real*>(weight.data)[at + k];
  }
}

template <class Real>
Real read_bias(const AnyVector& bias, i64 row) {
  if (!bias.data) return 0;
  if (bias.dtype == Dtype::bf16) return static_cast<Real>(bf16_float(static_cast<const uint16_t*>(bias.data)[row]));
  if (bias.dtype == Dtype::f64) return static_cast<Real>(static_cast<const double*>(bias.data)[row]);
  return static_cast<Real>(static_cast<const float*>(bias.data)[row]);
}

// w . h of four examples at a time, so that each part of the row is loaded once for them.
template <class Real>
WIDEHEAD_INLINE void four_dots(const Real* w, const Real* const* h, i64 d, Real* out) {
  constexpr i64 kLanes = Simd<Real>::kLanes;
  Vec<Real> sum[4] = {};
  i64 k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    const Vec<Real> x = load(w + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += x * load(h[j] + k);
  }
  for (int j = 0; j < 4; ++j) {
    Real rest = 0;
    for (i64 i = k; i < d; ++i) rest += w[i] * h[j][i];
    out[j] = sum_lanes<Real>(sum[j]) + rest;
  }
}

template <class Real>
void hashed_logits(const HashedRows& p, void* to, void* memory) {
  Real *logits = static_cast<Real*>(to), *row = static_cast<Real*>(memory);
  const Real* hidden = static_cast<const Real*>(p.hidden);
  const i64 d = p.features, bytes = p.weight.stride * size_of(p.weight.dtype);
  for (i64 r = 0; r < p.n; ++r) {
    if (r + kRowsAhead < p.n) prefetch_row(p.weight.data, p.rows[r + kRowsAhead], bytes);
    read_row(p.weight, p.rows[r], row);
    const Real bias = read_bias<Real>(p.bias, p.rows[r]);
    const i64 end = p.segments[r + 1];
    for (i64 at = p.segments[r]; at < end; at += 4) {
      const Real* h[4];
      Real dots[4];
      for (i64 j = 0; j < 4; ++j) h[j] = hidden + static_cast<i64>(p.examples[at_most(at + j, end - 1)]) * d;
      four_dots(row, h, d, dots);
      for (i64 j = 0; j < at_most(4, end - at); ++j) logits[p.places[at + j]] = dots[j] + bias;
    }
  }
}

// out += g h, of four at a time.
template <class Real>
WIDEHEAD_INLINE void add_four(const Real* g, const Real* const* h, i64 d, Real* out) {
  constexpr i64 kLanes = Simd<Real>::kLanes;
  i64 k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    Vec<Real> sum = load(out + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum += g[j] * load(h[j] + k);
    store(out + k, sum);
  }
  for (; k < d; ++k)
    for (int j = 0; j < 4; ++j) out[k] += g[j] * h[j][k];
}

// gradient += g h and grad_hidden += g w, for all examples of a row.
template <class Real>
Real row_gradient(const HashedRows& p, const HashedStep& step, i64 r, const Real* row, Real* gradient) {
  const Real *grads = static_cast<const Real*>(step.grads), *hidden = static_cast<const Real*>(p.hidden);
  Real* grad_hidden = static_cast<Real*>(step.grad_hidden);
  const i64 d = p.features;
  for (i64 k = 0; k < d; ++k) gradient[k] = 0;
  Real bias = 0;
  const i64 end = p.segments[r + 1];
  for (i64 at = p.segments[r]; at < end; at += 4) {
    const i64 n = at_most(4, end - at);
    Real g[4] = {};
    const Real* h[4];
    for (i64 j = 0; j < 4; ++j) {
      const i64 pair = at + at_most(j, n - 1);
      h[j] = hidden + static_cast<i64>(p.examples[pair]) * d;
      if (j < n) g[j] = grads[p.places[pair]];
      bias += g[j];
    }
    add_four(g, h, d, gradient);
    if (!grad_hidden) continue;
    for (i64 j = 0; j < n; ++j) {
      Real* __restrict to = grad_hidden + static_cast<i64>(p.examples[at + j]) * d;
      for (i64 k = 0; k < d; ++k) to[k] += g[j] * row[k];
    }
  }
  return bias;
}

// Notes by how much of its length a row has moved.
template <class Real>
void add_drift(const HashedStep& step, const AnyMatrix& weight, i64 row, const Real* before, Real* after) {
  read_row(weight, row, after);
  Real moved = 0, length = 0;
  for (i64 k = 0; k < weight.cols; ++k) {
    const Real by = after[k] - before[k];
    moved += by * by;
    length += after[k] * after[k];
  }
  float& sum = step.drift->sums[row];
  if (moved > 0) sum += static_cast<float>(__builtin_sqrt(moved / (length > 0 ? length : moved)));
  if (sum > static_cast<float>(step.drift->limit)) step.moved[(*step.n_moved)++] = row;
}

template <class Real>
void hashed_step(const HashedRows& p, const HashedStep& step, void* memory) {
  Real *row = static_cast<Real*>(memory), *gradient = row + p.features, *after = gradient + p.features;
  const i64 bytes = p.weight.stride * size_of(p.weight.dtype);
  for (i64 r = 0; r < p.n; ++r) {
    if (r + kRowsAhead < p.n) prefetch_row_to_write(p.weight.data, p.rows[r + kRowsAhead], bytes);
    read_row(p.weight, p.rows[r], row);
    const Real bias = row_gradient(p, step, r, row, gradient);
    if (step.grad_rows.data) {
      Real* out = static_cast<Real*>(step.grad_rows.data) + r * step.grad_rows.stride;
      for (i64 k = 0; k < p.features; ++k) out[k] = gradient[k];
      if (step.grad_bias.data) static_cast<Real*>(step.grad_bias.data)[r] = bias;
    }
    if (!step.update) continue;
    update_row(*step.update, p.weight, p.rows[r], gradient);
    if (p.bias.data) update_bias(*step.update, p.bias, p.rows[r], 1, &bias);
    if (step.drift) add_drift(step, p.weight, p.rows[r], row, after);
  }
}

inline void hashed_logits_any(const HashedRows& p, void* logits, void* scratch) {
  if (p.weight.dtype == Dtype::f64)
    hashed_logits<double>(p, logits, scratch);
  else
    hashed_logits<float>(p, logits, scratch);
}
inline void hashed_step_any(const HashedRows& p, const HashedStep& step, void* scratch) {
  if (p.weight.dtype == Dtype::f64)
    hashed_step<double>(p, step, scratch);
  else
    hashed_step<float>(p, step, scratch);
}

inline HashedKernels hashed_table() { return {hashed_logits_any, hashed_step_any}; }

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
