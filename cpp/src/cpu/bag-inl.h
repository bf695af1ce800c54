// bag-inl.h -- embedding bag: sums of rows, and the optimiser's step on the rows that a batch touches
//
// Rows are contiguous and the loops over them plain, so the compiler vectorises them; what costs time is that the rows lie at
// random in a table far larger than the cache. So the rows of the entries ahead are requested while this one is added.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/update-inl.h"
#include "widehead/random.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

constexpr i64 kAhead = 6;  // rows in flight: enough to cover DRAM latency at about 20 ns a row

inline void prefetch_row(const void* data, i64 row, i64 row_bytes) {
  const char* p = static_cast<const char*>(data) + row * row_bytes;
  for (i64 i = 0; i < row_bytes; i += 64) __builtin_prefetch(p + i);
}
inline void prefetch_row_to_write(const void* data, i64 row, i64 row_bytes) {
  const char* p = static_cast<const char*>(data) + row * row_bytes;
  for (i64 i = 0; i < row_bytes; i += 64) __builtin_prefetch(p + i, 1);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return bf16_float(x.bits); }

template <class W, class A>
void bag_add(const W* __restrict row, A value, i64 d, A* __restrict sum) {
  for (i64 k = 0; k < d; ++k) sum[k] += value * widen(row[k]);
}

template <class W, class A, class I>
void bag_forward_rows(const BagForwardPlan& p, i64 begin, i64 end) {
  const i64 d = p.table.cols, row_bytes = p.table.stride * static_cast<i64>(sizeof(W));
  const auto* indices = static_cast<const I*>(p.indices);
  const auto* table = static_cast<const W*>(p.table.data);
  const i64 last = p.indptr[end];
  for (i64 b = begin; b < end; ++b) {
    A* sum = static_cast<A*>(p.out.data) + b * p.out.stride;
    for (i64 k = 0; k < d; ++k) sum[k] = 0;
    for (i64 e = p.indptr[b]; e < p.indptr[b + 1]; ++e) {
      if (e + kAhead < last) prefetch_row(table, indices[e + kAhead], row_bytes);
      bag_add(table + static_cast<i64>(indices[e]) * p.table.stride, p.values ? static_cast<A>(p.values[e]) : A{1}, d,
              sum);
    }
    if (!p.normalise) continue;
    const double norm = __builtin_sqrt(dot_f64(sum, sum, d));
    if (p.norms) static_cast<A*>(p.norms)[b] = static_cast<A>(norm);
    const A factor = norm > 0.0 ? static_cast<A>(p.scale / norm) : A{0};
    for (i64 k = 0; k < d; ++k) sum[k] *= factor;
  }
}

template <class W, class A>
void bag_forward_indices(const BagForwardPlan& p, i64 begin, i64 end) {
  if (p.wide)
    bag_forward_rows<W, A, i64>(p, begin, end);
  else
    bag_forward_rows<W, A, int32_t>(p, begin, end);
}

inline void bag_forward_range(const BagForwardPlan& p, i64 begin, i64 end) {
  switch (p.table.dtype) {
    case Dtype::f64: return bag_forward_indices<double, double>(p, begin, end);
    case Dtype::bf16: return bag_forward_indices<bf16, float>(p, begin, end);
    default: return bag_forward_indices<float, float>(p, begin, end);
  }
}

template <class A>
void bag_gradient_rows(const BagGradientPlan& p, i64 begin, i64 end) {
  const i64 d = p.grad.cols;
  for (i64 b = begin; b < end; ++b) {
    const A* g = static_cast<const A*>(p.grad.data) + b * p.grad.stride;
    const A* out = static_cast<const A*>(p.out.data) + b * p.out.stride;
    A* sum = static_cast<A*>(p.sums) + b * d;
    const double norm = static_cast<const A*>(p.norms)[b];
    const A factor = norm > 0.0 ? static_cast<A>(p.scale / norm) : A{0};
    const A along = static_cast<A>(dot_f64(g, out, d) / (p.scale * p.scale));
    for (i64 k = 0; k < d; ++k) sum[k] = factor * (g[k] - along * out[k]);
  }
}

inline void bag_gradient_range(const BagGradientPlan& p, i64 begin, i64 end) {
  if (p.grad.dtype == Dtype::f64)
    bag_gradient_rows<double>(p, begin, end);
  else
    bag_gradient_rows<float>(p, begin, end);
}

template <class W, class A>
void bag_step_rows(const BagStepPlan& p, i64 begin, i64 end, void* scratch) {
  const i64 d = p.table.cols, row_bytes = p.table.stride * static_cast<i64>(sizeof(W));
  const i64 first_bytes = p.update->first.stride * static_cast<i64>(sizeof(A));
  const i64 second_bytes = p.update->second.stride * static_cast<i64>(sizeof(A));
  const UpdateScalars<A> scalars(*p.update);
  A* g = static_cast<A*>(scratch);
  for (i64 s = begin; s < end; ++s) {
    if (s + kAhead < p.touched) {
      const i64 next = p.features[s + kAhead];
      prefetch_row_to_write(p.table.data, next, row_bytes);
      if (p.update->first) prefetch_row_to_write(p.update->first.data, next, first_bytes);
      if (p.update->second) prefetch_row_to_write(p.update->second.data, next, second_bytes);
    }
    for (i64 k = 0; k < d; ++k) g[k] = 0;
    for (i64 e = p.segments[s]; e < p.segments[s + 1]; ++e)
      bag_add(static_cast<const A*>(p.grad.data) + p.examples[e] * p.grad.stride,
              p.values ? static_cast<A>(p.values[e]) : A{1}, d, g);
    update_row_as<A>(*p.update, scalars, p.table, p.features[s], g);
  }
}

inline void bag_step_range(const BagStepPlan& p, i64 begin, i64 end, void* scratch) {
  switch (p.table.dtype) {
    case Dtype::f64: return bag_step_rows<double, double>(p, begin, end, scratch);
    case Dtype::bf16: return bag_step_rows<bf16, float>(p, begin, end, scratch);
    default: return bag_step_rows<float, float>(p, begin, end, scratch);
  }
}

inline BagKernels bag_table() { return {bag_forward_range, bag_gradient_range, bag_step_range}; }

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
