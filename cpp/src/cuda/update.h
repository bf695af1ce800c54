// update.h -- an optimiser's step on rows of a weight matrix: eight columns by a thread, or a launch over many rows
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/convert.h"
#include "cuda/launch.h"
#include "update_math.h"
#include "widehead/random.h"
#include "widehead/update.h"

namespace widehead::cuda {

__device__ inline int up_to8(i64 n) { return n < 8 ? static_cast<int>(n) : 8; }

// Eight elements; `wide`: p is aligned to 16 bytes and all eight are there. Else n of them are, the rest stay as they are.
template <class T>
__device__ inline void load8(const T* p, int n, bool wide, T (&x)[8]) {
  if (wide) {
    constexpr int kPieces = static_cast<int>(8 * sizeof(T) / sizeof(uint4));
    union {
      uint4 pieces[kPieces];
      T elements[8];
    } u;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) u.pieces[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = u.elements[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) x[i] = p[i];
}
template <class T>
__device__ inline void store8(T* p, int n, bool wide, const T (&x)[8]) {
  if (wide) {
    constexpr int kPieces = static_cast<int>(8 * sizeof(T) / sizeof(uint4));
    union {
      T elements[8];
      uint4 pieces[kPieces];
    } u;
#pragma unroll
    for (int i = 0; i < 8; ++i) u.elements[i] = x[i];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(p)[i] = u.pieces[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) p[i] = x[i];
}

// Matrices of one step as a kernel sees them. `wide`: groups of eight columns are aligned in all of them.
template <class W>
struct StepView {
  using Real = RealOf<W>;
  W* weight;
  Real* first;   // null where the optimiser has none
  Real* second;  // adagrad's is not here: it has a row scale
  W* lost;       // Kahan's compensation, or null
  i64 weight_stride, first_stride, second_stride, lost_stride;
  i64 cols;
  i64 first_row;
  std::uint64_t seed;
  std::uint64_t step;
  const i64* device_step;  // in the place of step - 1
  Rounding rounding;
  bool wide;

  __device__ RandomStream random() const {
    return {seed, Purpose::rounding_weight, device_step ? static_cast<std::uint64_t>(*device_step) + 1 : step};
  }
};

template <class T>
inline bool aligned16(const T* data, i64 stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * static_cast<i64>(sizeof(T)) % 16 == 0;
}

template <class W>
StepView<W> step_view(const Update& u, const AnyMatrix& weight) {
  using Real = RealOf<W>;
  StepView<W> v{};
  v.weight = static_cast<W*>(weight.data);
  v.weight_stride = weight.stride;
  v.wide = aligned16(v.weight, v.weight_stride);
  if (u.first) {
    v.first = static_cast<Real*>(u.first.data);
    v.first_stride = u.first.stride;
    v.wide = v.wide && aligned16(v.first, v.first_stride);
  }
  if (u.second && u.optimizer == Optimizer::adam) {
    v.second = static_cast<Real*>(u.second.data);
    v.second_stride = u.second.stride;
    v.wide = v.wide && aligned16(v.second, v.second_stride);
  }
  if (u.compensation && sizeof(W) == 2) {
    v.lost = static_cast<W*>(u.compensation.data);
    v.lost_stride = u.compensation.stride;
    v.wide = v.wide && aligned16(v.lost, v.lost_stride);
  }
  v.cols = weight.cols;
  v.first_row = u.first_row;
  v.seed = u.seed;
  v.step = u.step;
  v.device_step = u.device_step;
  v.rounding = u.rounding;
  return v;
}

template <class W>
__device__ inline W stochastic(float x, std::uint32_t random16) {
  if constexpr (std::is_same_v<W, bf16>) {
    return {bf16_stochastic(x, random16)};
  } else {
    return {f16_stochastic(x, random16)};
  }
}

// Steps columns [col, col + 8) of `row`, as far as there are so many, by the gradients g; col is a multiple of 8.
// `random` is v.random(), `row_scale` adagrad's. kMoments: with v.first.
template <Optimizer kKind, bool kMoments, class W>
__device__ inline void step8(const StepView<W>& v, const UpdateScalars<RealOf<W>>& s, const RandomStream& random,
                             i64 row, i64 col, const RealOf<W> (&g)[8], RealOf<W> row_scale) {
  using Real = RealOf<W>;
  constexpr bool kSecond = kKind == Optimizer::adam;
  const int n = up_to8(v.cols - col);
  const bool wide = v.wide && n == 8;
  W* const w_at = v.weight + row * v.weight_stride + col;
  Real* const m_at = kMoments ? v.first + row * v.first_stride + col : nullptr;
  Real* const v_at = kSecond ? v.second + row * v.second_stride + col : nullptr;
  W w[8] = {};
  Real x[8], m[8] = {}, q[8] = {};
  load8(w_at, n, wide, w);
  if constexpr (kMoments) load8(m_at, n, wide, m);
  if constexpr (kSecond) load8(v_at, n, wide, q);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    x[i] =
        stepped<Real>(s, kKind, to_float(w[i]), g[i], kMoments ? &m[i] : nullptr, kSecond ? &q[i] : nullptr, row_scale);
  if constexpr (kMoments) store8(m_at, n, wide, m);
  if constexpr (kSecond) store8(v_at, n, wide, q);
  if constexpr (sizeof(W) == 2) {
    if (v.lost) {
      W* const lost_at = v.lost + row * v.lost_stride + col;
      W lost[8] = {};
      load8(lost_at, n, wide, lost);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float want = to_float(lost[i]) + x[i];
        w[i] = from_float<W>(want);
        lost[i] = from_float<W>(want - to_float(w[i]));
      }
      store8(lost_at, n, wide, lost);
    } else if (v.rounding == Rounding::stochastic) {
      const Philox4 bits =
          random.block(static_cast<std::uint64_t>(v.first_row + row), static_cast<std::uint32_t>(col >> 3));
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = stochastic<W>(x[i], (bits.v[i >> 1] >> ((i & 1) * 16)) & 0xFFFFu);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = from_float<W>(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = x[i];
  }
  store8(w_at, n, wide, w);
}

// What one call's steps share in scratch memory.
struct StepScratch {
  void* scalars = nullptr;     // UpdateScalars<Real>, filled by launch_scalars
  void* row_scales = nullptr;  // Real [rows], adagrad
};
// `rows`: the most rows of one launch.
StepScratch take_step_scratch(Scratch& scratch, const Update& u, Dtype weight, i64 rows);

// Gradients of some rows: of row first + i, or of rows[i] (-1: none) where `rows` is given. A bias takes one column.
struct RowGradients {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  i64 n = 0;
  i64 stride = 1;
  i64 first = 0;
  const i64* rows = nullptr;
};

// Once a call, before its steps: numbers of the step, from device_lr and device_step where they are given.
void launch_scalars(const Device& device, const Update& u, Dtype weight, const StepScratch& scratch);
// The step on those rows of the whole weight, and of the state in u. `refused`: nothing happens where it is not 0.
void launch_update(const Device& device, const Update& u, const AnyMatrix& weight, const RowGradients& g,
                   const StepScratch& scratch, const std::int32_t* refused);
// The same for a bias; float64 exactly when the weights are.
void launch_update_bias(const Device& device, const Update& u, const AnyVector& bias, const RowGradients& g,
                        const StepScratch& scratch, const std::int32_t* refused);

}  // namespace widehead::cuda
