// topk_scan.h -- a warp's walk over its piece of a tile of logits, and what it keeps of it
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/convert.h"
#include "cuda/exclude.h"
#include "cuda/intrinsics.h"
#include "cuda/launch.h"
#include "cuda/topk.h"
#include "widehead/view.h"

namespace widehead::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block
constexpr int kVector = 4;                             // neighbouring logits that a lane reads at once
constexpr int kPart = 32 * kVector;                    // columns that a warp reads at once: the smallest buffer
template <class Real>
constexpr int kParts = 16 / sizeof(Real);  // that a lane holds for one comparison: what registers allow
template <class Real>
constexpr int kStep = kParts<Real> * kPart;  // columns

template <class Real>
struct ItemState {
  Real last;  // score of the list's last, -infinity while it is not full
  std::int32_t filled, waiting;
};

template <class Real>
struct Lists {
  int width, room;  // of a list, of a buffer
  Entry<Real>*best, *waiting;
  ItemState<Real>* states;
  OnlineSum<double>* sums;  // or null
};

// Logits of rows [first_row, first_row + rows) and classes [first, first + cols), item = slot * rows + row.
template <class Real>
struct Selection {
  const Real* z;
  i64 stride, first, first_row;
  int rows, cols, slots, piece, items_a_block;
  bool fresh, last;     // first and last tile
  ConstAnyVector bias;  // of Real, bfloat16 or float16
  bool bias_vectors;    // all of the tile's can be read as Four
  Real softcap;
  const float* offset;  // added after the cap; or null
  Excluded excluded;
  Lists<Real> lists;
  // Results, beginning with first_row; `done` of each row are there from passes before.
  Real* scores;
  i64 *classes, scores_stride, classes_stride, done;
};

template <class T>
struct alignas(sizeof(T) < 4 ? kVector * sizeof(T) : 16) Four {
  T at[kVector];
};

// This lane's first column of a part.
__device__ inline int lane_column(int begin, int part) {
  return begin + part * kPart + static_cast<int>(threadIdx.x) % 32 * kVector;
}

template <class T, int kN, class Real>
__device__ inline void add_vector(const T* from, bool vectors, int begin, int end, Real (&v)[kN * kVector]) {
  Four<T> x[kN]{};
#pragma unroll
  for (int part = 0; part < kN; ++part) {
    const int c = lane_column(begin, part);
    if (vectors) {
      if (c < end) x[part] = *reinterpret_cast<const Four<T>*>(from + c);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (c + i < end) x[part].at[i] = from[c + i];
    }
  }
#pragma unroll
  for (int i = 0; i < kN * kVector; ++i) v[i] += static_cast<Real>(to_float(x[i / kVector].at[i % kVector]));
}

// Logits of kN parts of the tile's row, of this lane: kVector a part. Those at `end` and behind are -infinity.
template <int kN, class Real>
__device__ inline void read_logits(const Selection<Real>& a, const Real* z, int begin, int end,
                                   Real (&v)[kN * kVector]) {
  const bool whole = begin + kN * kPart <= end;
#pragma unroll
  for (int part = 0; part < kN; ++part) {
    const int c = lane_column(begin, part);
    Four<Real> x{};
    if (c < end) x = *reinterpret_cast<const Four<Real>*>(z + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[part * kVector + i] = x.at[i];
  }
  if (a.bias.data) {
    if (a.bias.dtype == DtypeOf<Real>::value) {
      add_vector<Real, kN>(static_cast<const Real*>(a.bias.data) + a.first, a.bias_vectors, begin, end, v);
    } else if (a.bias.dtype == Dtype::bf16) {
      add_vector<bf16, kN>(static_cast<const bf16*>(a.bias.data) + a.first, a.bias_vectors, begin, end, v);
    } else {
      add_vector<f16, kN>(static_cast<const f16*>(a.bias.data) + a.first, a.bias_vectors, begin, end, v);
    }
  }
  if (a.softcap > 0) {
#pragma unroll
    for (int i = 0; i < kN * kVector; ++i) v[i] = a.softcap * std::tanh(v[i] * (Real{1} / a.softcap));
  }
  if (a.offset) add_vector<float, kN>(a.offset + a.first, false, begin, end, v);
  if (whole) return;
#pragma unroll
  for (int part = 0; part < kN; ++part)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (lane_column(begin, part) + i >= end) v[part * kVector + i] = -static_cast<Real>(INFINITY);
}

// Sorts an item's buffer into its list. `sorted` is shared memory for both; by all threads of the block.
template <class Real>
__device__ inline void merge_item(const Lists<Real>& lists, i64 item, ItemState<Real>& shared_state,
                                  Entry<Real>* sorted) {
  const ItemState<Real> state = shared_state;
  Entry<Real>* best = lists.best + item * lists.width;
  const Entry<Real>* waiting = lists.waiting + item * lists.room;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < lists.room; i += kThreads) {
    sorted[i] = i < state.filled ? best[i] : no_entry<Real>();
    sorted[lists.room + i] = i < state.waiting ? waiting[i] : no_entry<Real>();
  }
  __syncthreads();
  keep_best_half(sorted, lists.room);
  const int found = state.filled + state.waiting, filled = found < lists.width ? found : lists.width;
  for (int i = thread; i < filled; i += kThreads) best[i] = sorted[i];
  if (thread == 0) shared_state = {sorted[lists.width - 1].score, filled, 0};
  __syncthreads();
}

// What a warp knows of its item.
template <class Real>
struct Scan {
  ItemState<Real> state;
  // Only what comes behind this is taken.
  Real after_score;
  i64 after_class;
  int column, end;  // of the tile
  int part;         // next one to collect of the step at `column`; -1: the step has not been looked at
  i64 row;          // of the batch
  Entry<Real>* waiting;
};

template <class Real>
__device__ inline Scan<Real> begin_scan(const Selection<Real>& a, int item, bool exists) {
  Scan<Real> s{{-static_cast<Real>(INFINITY), 0, 0}, static_cast<Real>(INFINITY), -1, 0, 0, -1, 0, nullptr};
  if (!exists) return s;
  const int slot = item / a.rows, row = item % a.rows;
  s.column = slot * a.piece;
  s.end = s.column + a.piece < a.cols ? s.column + a.piece : a.cols;
  s.row = row;
  s.waiting = a.lists.waiting + static_cast<i64>(item) * a.lists.room;
  if (!a.fresh) s.state = a.lists.states[item];
  if (a.done > 0) {
    s.after_score = a.scores[row * a.scores_stride + a.done - 1];
    s.after_class = a.classes[row * a.classes_stride + a.done - 1];
  }
  return s;
}

// Puts the part's logits that belong into the list into the buffer. False: there is no room for them.
template <class Real>
__device__ inline bool collect_part(const Selection<Real>& a, const Real* z, Scan<Real>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, begin = s.column + s.part * kPart;
  Real v[kVector];
  read_logits<1>(a, z, begin, s.end, v);
  const i64 cls = a.first + begin + lane * kVector;
  unsigned lanes[kVector];
  int n = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    // Classes come in ascending order: one that equals the list's last comes too late.
    bool taken = v[i] > s.state.last && (v[i] < s.after_score || (v[i] == s.after_score && cls + i > s.after_class));
    if (taken) taken = !a.excluded.contains(a.first_row + s.row, static_cast<std::uint32_t>(cls + i));
    lanes[i] = __ballot_sync(~0u, taken);
    n += __popc(lanes[i]);
  }
  if (s.state.waiting + n > a.lists.room) return false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (lanes[i] >> lane & 1)
      s.waiting[s.state.waiting + __popc(lanes[i] & ((1u << lane) - 1))] = {v[i], static_cast<std::uint32_t>(cls + i)};
    s.state.waiting += __popc(lanes[i]);
  }
  return true;
}

}  // namespace widehead::cuda
