// exact_state.h -- what the exact head keeps on a GPU: its state, a batch, and the log of step matrices
//
// A row V_c with label e stands for V_c times the matrices of the steps e, e + 1, ... plus omega. Steps are counted in
// base 8: level 0 holds the steps of the group of 8 under way, level l an interval of 8^l steps for each unit of digit
// l. A matrix of level 0 is the product of its step and all later ones, one of a level above that of its interval and
// the later ones of its level. So where a label lies follows from the number of steps alone, and a row takes one
// product a level.
#pragma once
#include <cuda_runtime.h>

#include "cuda/dense_rows.h"
#include "widehead/exact_device.h"

namespace widehead::cuda {

constexpr int kDigitBits = 3, kRadix = 1 << kDigitBits, kLevels = 9;
constexpr i64 kMostSteps = i64{1} << (kDigitBits * kLevels);      // that the log can tell apart
constexpr int kMatrices = kRadix + (kLevels - 1) * (kRadix - 1);  // a level above 0 is never full between steps
constexpr int kPlaces = 1 + kRadix * kLevels;                     // 0: as of now
constexpr i64 kChunk = 256;                                       // classes with one chunk_last
constexpr std::int32_t kNoSlot = 0x7FFFFFFF;

struct ExactHeader {
  i64 steps;    // since the rows were W
  i64 version;  // changes with every step, and when the caller has written to the rows
  i64 taken;    // steps since exact_init
  i64 fetched, moved;
  // A matrix is kept as its difference to I until it is itself the smaller: see exact_log.h of the CPU.
  int beside_identity[kMatrices];
};

__host__ __device__ constexpr int matrix_index(int level, int index) {
  return level == 0 ? index : kRadix + (level - 1) * (kRadix - 1) + index;
}

// The log when `count` steps of the group that began with step `group` are in it.
struct LogTime {
  i64 group;
  int count;

  __device__ static LogTime of(i64 steps) { return {steps & ~i64{kRadix - 1}, static_cast<int>(steps & (kRadix - 1))}; }
  __device__ i64 now() const { return group + count; }
  __device__ int digit(int level) const {
    return level == 0 ? count : static_cast<int>(group >> (kDigitBits * level)) & (kRadix - 1);
  }
  // Where a row with the label begins: 0, or 1 + 8 level + index.
  __device__ int place(i64 label) const {
    if (label >= group) return label >= now() ? 0 : 1 + static_cast<int>(label - group);
    for (int level = 1; level < kLevels; ++level) {
      const int above = kDigitBits * (level + 1);
      const i64 first = group >> above << above;
      if (label >= first) return 1 + kRadix * level + static_cast<int>((label - first) >> (kDigitBits * level));
    }
    return 0;
  }
};

// The caller's rows and the pieces of `state`.
template <class RowType, class FactorType>
struct ExactView {
  using Row = RowType;
  using Factor = FactorType;

  Row* weight;
  Row* velocity;  // or null
  i64 weight_stride, velocity_stride;
  i64 classes, features, width;
  ExactHeader* header;
  double* squares;            // R'R [width, width] of the rows R = [W | velocities]
  double* sums;               // R'1
  double* omega;              // added to every row
  Factor* matrices;           // [kMatrices, width, width]
  std::uint32_t* labels;      // [D]
  std::int32_t* slots;        // [D] kNoSlot between calls
  std::uint32_t* list;        // [D] room for classes
  std::uint32_t* chunk_last;  // the largest label of a chunk of classes since the rows were W

  ExactView(const ExactDevice& head, Scratch& memory)
      : weight(static_cast<Row*>(head.weight.data)),
        velocity(static_cast<Row*>(head.velocity.data)),
        weight_stride(head.weight.stride),
        velocity_stride(head.velocity.stride),
        classes(head.weight.rows),
        features(head.weight.cols),
        width(features * (velocity ? 2 : 1)) {
    header = memory.take<ExactHeader>(1);
    squares = memory.take<double>(width * width);
    sums = memory.take<double>(width);
    omega = memory.take<double>(width);
    matrices = memory.take<Factor>(kMatrices * width * width);
    labels = memory.take<std::uint32_t>(classes);
    slots = memory.take<std::int32_t>(classes);
    list = memory.take<std::uint32_t>(classes);
    chunk_last = memory.take<std::uint32_t>(ceil_div(classes, kChunk));
  }

  __device__ Factor* matrix(int level, int index) const {
    return matrices + matrix_index(level, index) * width * width;
  }
  __device__ bool beside_identity(int level, int index) const {
    return header->beside_identity[matrix_index(level, index)] != 0;
  }
  __device__ Row& stored(i64 id, i64 k) const {
    return k < features ? weight[id * weight_stride + k] : velocity[id * velocity_stride + (k - features)];
  }
};

struct BatchHeader {
  i64 version;   // of the head when this was made
  int refused;   // a bad value in it
  int complete;  // its derivatives are there
};

// Classes by place in the log: how many, where they begin in a list, and the tiles of one place that the list is cut
// into.
struct PlaceTable {
  unsigned long long counts[kPlaces];
  unsigned long long next[kPlaces];  // free entry of the list
  i64 starts[kPlaces + 1];
  i64 tiles[kPlaces + 1];
};

template <class Factor>
struct BatchView {
  i64 examples, targets;
  BatchHeader* header;  // cleared with the places behind it
  PlaceTable* places;
  RowTargets* of_example;  // [m]
  int* example;            // [nnz] of each target; -1: none
  int* row;                // [nnz] of each target, in `rows`
  i64* ids;                // [nnz] of each row
  Factor* rows;            // [nnz, width] the distinct rows of the targets
  Factor* hidden;          // [m, d]
  Factor* hidden_squares;  // H R'R [m, width]
  Factor* by_rows;         // S'R [m, width], S the derivative by the outputs
  double *grad_A, *grad_q, *grad_s;

  BatchView(i64 examples_, i64 targets_, i64 features, i64 width, Scratch& memory)
      : examples(examples_), targets(targets_) {
    header = memory.take<BatchHeader>(1);
    places = memory.take<PlaceTable>(1);
    of_example = memory.take<RowTargets>(examples);
    example = memory.take<int>(targets);
    row = memory.take<int>(targets);
    ids = memory.take<i64>(targets);
    rows = memory.take<Factor>(targets * width);
    hidden = memory.take<Factor>(examples * features);
    hidden_squares = memory.take<Factor>(examples * width);
    by_rows = memory.take<Factor>(examples * width);
    grad_A = memory.take<double>(targets);
    grad_q = memory.take<double>(examples);
    grad_s = memory.take<double>(examples);
  }

  __device__ i64 distinct() const { return places->starts[kPlaces]; }
};

constexpr int kTileRows = 8;
// Rows that a block takes through the log: as many as shared memory holds twice.
inline int tile_rows(const Device& device, i64 width, i64 size) {
  const i64 room = hardware(device.index).shared_bytes;
  if (2 * kTileRows * width * size <= room) return kTileRows;
  if (2 * width * size <= room) return 1;
  throw CapacityError("in_features: expected at most " + std::to_string(room / (2 * size)) +
                      " columns of weight and velocity on this GPU, got " + std::to_string(width));
}

inline Scratch memory_of(void* at, i64 bytes) {
  Device device;
  device.scratch = at;
  device.scratch_bytes = bytes;
  return Scratch(device);
}
template <class Row, class Factor>
ExactView<Row, Factor> view_of(const ExactDevice& head) {
  Scratch memory = memory_of(head.state, head.state_bytes);
  return {head, memory};
}
template <class Factor, class Args>
BatchView<Factor> batch_of(const Args& args, i64 examples, i64 targets) {
  Scratch memory = memory_of(args.batch, args.batch_bytes);
  const i64 d = args.head.weight.cols;
  return {examples, targets, d, d * (args.head.velocity ? 2 : 1), memory};
}

// Calls f(Row{}, Factor{}).
template <class F>
void by_exact_types(const ExactDevice& head, F f) {
  if (head.weight.dtype == Dtype::f64) return f(double{}, double{});
  if (head.wide) return f(float{}, double{});
  f(float{}, float{});
}

// J of a step R <- R J + S B, see exact_gram.h of the CPU.
struct StepCarry {
  double j11, j12, j21, j22;

  // Column c of row J; by J - I, since 1 - lr decay itself would be wrong by as much every step.
  template <class T>
  __device__ T carried(const T* row, i64 c, i64 features, bool momentum) const {
    if (!momentum) return row[c] + static_cast<T>(j11 - 1) * row[c];
    const T w = row[c < features ? c : c - features], v = row[c < features ? c + features : c];
    if (c < features) return w + (static_cast<T>(j11 - 1) * w + static_cast<T>(j21) * v);
    return static_cast<T>(j12) * w + static_cast<T>(j22) * v;
  }
};

// What the kernels of a step agree on, found by its first.
struct StepPlan {
  int go;  // 0: the step changes nothing
  LogTime before, after;
  int carries;  // levels that are full after the step, and go up as one interval
  double lr, scale;
  StepCarry carry;
};

__device__ inline i64 thread_in_grid() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 grid_threads() { return static_cast<i64>(gridDim.x) * blockDim.x; }
__device__ inline double sum_over_warp(double x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}
__device__ inline bool is_finite(double x) { return x - x == 0; }

// Of exact_log.cu. Moves what the full levels held: rows to now, matrices up. Then counts the step. `places` counts
// nothing yet.
template <class Row, class Factor>
void advance_log(const Device& device, const ExactView<Row, Factor>& head, const StepPlan* plan, PlaceTable* places,
                 const BatchView<Factor>& batch);
// Level 0's matrices after they took a step.
template <class Row, class Factor>
void settle_group(const Device& device, const ExactView<Row, Factor>& head, const StepPlan* plan);

}  // namespace widehead::cuda
