// exact_fetch.cu -- the exact head's forward and backward pass on CUDA, and rows of it
#include "cuda/backend.h"
#include "cuda/convert.h"
#include "cuda/exact_places.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;

// Which example each target is of, and for each class its first target. A warp an example.
__global__ void __launch_bounds__(kThreads)
    claim_classes(const RowTargets* of_example, i64 examples, const i64* ids, int* example, std::int32_t* slots) {
  const i64 lane = threadIdx.x % 32;
  for (i64 i = thread_in_grid() / 32; i < examples; i += grid_threads() / 32)
    for (i64 t = of_example[i].begin + lane; t < of_example[i].end; t += 32) {
      example[t] = static_cast<int>(i);
      atomicMin(slots + ids[t], static_cast<std::int32_t>(t));
    }
}

template <class Real>
__device__ inline void put_number(const AnyMatrix& m, i64 i, i64 k, Real x) {
  const i64 at = i * m.stride + k;
  switch (m.dtype) {
    case Dtype::f64: static_cast<double*>(m.data)[at] = static_cast<double>(x); return;
    case Dtype::bf16: static_cast<bf16*>(m.data)[at] = from_float<bf16>(x); return;
    case Dtype::f16: static_cast<f16*>(m.data)[at] = from_float<f16>(x); return;
    default: static_cast<float*>(m.data)[at] = static_cast<float>(x);
  }
}

// The first target of each class; in the list its row's number takes the target's place in `slots`.
template <class View>
struct DistinctTargets {
  static constexpr bool kSkips = false;
  View head;
  BatchView<typename View::Factor> batch;
  const i64* target_ids;

  __device__ bool due() const { return true; }
  __device__ i64 items() const { return batch.targets; }
  __device__ int place(i64 t) const {
    if (batch.example[t] < 0 || head.slots[target_ids[t]] != t) return -1;
    return LogTime::of(head.header->steps).place(head.labels[target_ids[t]]);
  }
  __device__ void put(i64 t, i64 n) const {
    batch.ids[n] = target_ids[t];
    head.slots[target_ids[t]] = ~static_cast<std::int32_t>(n);
  }
};

template <class View>
struct AnyRows {
  static constexpr bool kSkips = false;
  View head;
  const i64* wanted;
  i64 n;
  i64* ids;  // of the list
  i64* to;   // row of the result for each of the list
  AnyMatrix out;
  Report report;

  __device__ bool due() const { return true; }
  __device__ i64 items() const { return n; }
  __device__ int place(i64 i) const {
    const i64 id = wanted[i];
    if (id >= 0 && id < head.classes) return LogTime::of(head.header->steps).place(head.labels[id]);
    report(Fault::row_range, Argument::rows, i, id, head.classes);
    for (i64 k = 0; k < head.features; ++k) put_number(out, i, k, nan(""));
    return -1;
  }
  __device__ void put(i64 i, i64 at) const {
    ids[at] = wanted[i];
    to[at] = i;
  }
};

// Rows of W as they are now.
template <class View>
struct Fetch {
  using Factor = typename View::Factor;
  View head;
  const PlaceTable* table;
  const i64* ids;

  __device__ bool due() const { return true; }
  __device__ LogTime time() const { return LogTime::of(head.header->steps); }
  __device__ i64 tiles(int) const { return table->tiles[kPlaces]; }
  __device__ RowTile tile(i64 number, int rows) const { return tile_of(*table, number, rows); }
  __device__ Factor load(const RowTile& tile, int r, i64 k) const {
    return static_cast<Factor>(head.stored(ids[tile.first + r], k));
  }
  __device__ Factor moved(i64 k, Factor x) const { return static_cast<Factor>(static_cast<double>(x) + head.omega[k]); }
  __device__ bool unit(const RowTile&) const { return false; }
  __device__ i64 own(const RowTile&, int) const { return 0; }
  __device__ void done(const RowTile&, int) const {}
};
template <class View>
struct FetchForBatch : Fetch<View> {
  using Factor = typename View::Factor;
  Factor* rows;

  __device__ void store(const RowTile& tile, int r, i64 k, Factor x) const {
    rows[(tile.first + r) * this->head.width + k] = this->moved(k, x);
  }
};
template <class View>
struct FetchOut : Fetch<View> {
  using Factor = typename View::Factor;
  const i64* to;
  AnyMatrix out;

  __device__ void store(const RowTile& tile, int r, i64 k, Factor x) const {
    if (k >= this->head.features) return;
    put_number(out, to[tile.first + r], k, this->moved(k, x));
  }
};

// H R'R, the first d rows of R'R.
template <class View>
struct HiddenSquares {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = false;
  View head;
  BatchView<Factor> batch;

  __device__ Extent extent(int) const { return extent_of(batch.examples, head.width, head.features); }
  __device__ bool skips(int, int) const { return false; }
  __device__ Factor a(int, int i, int k) const { return batch.hidden[element(i, head.features, k)]; }
  __device__ Factor b(int, int k, int j) const { return static_cast<Factor>(head.squares[element(k, head.width, j)]); }
  __device__ void store(int, int i, int j, Factor x) const { batch.hidden_squares[element(i, head.width, j)] = x; }
};

// A of each target, a warp each; then q and s of each example.
template <class View>
__global__ void __launch_bounds__(kThreads)
    outputs(View head, BatchView<typename View::Factor> batch, const i64* target_ids, double* A, double* q, double* s) {
  const i64 lane = threadIdx.x % 32, d = head.features;
  for (i64 w = thread_in_grid() / 32; w < batch.targets + batch.examples; w += grid_threads() / 32) {
    if (w < batch.targets) {
      const int i = batch.example[w];
      if (i < 0) continue;
      const int row = ~head.slots[target_ids[w]];
      double sum = 0;
      for (i64 k = lane; k < d; k += 32)
        sum += static_cast<double>(batch.rows[row * head.width + k]) * static_cast<double>(batch.hidden[i * d + k]);
      sum = sum_over_warp(sum);
      if (lane != 0) continue;
      A[w] = sum;
      batch.row[w] = row;
    } else {
      const i64 i = w - batch.targets;
      double squares = 0, sums = 0;
      for (i64 k = lane; k < d; k += 32) {
        const auto h = static_cast<double>(batch.hidden[i * d + k]);
        squares += static_cast<double>(batch.hidden_squares[i * head.width + k]) * h;
        sums += head.sums[k] * h;
      }
      squares = sum_over_warp(squares);
      sums = sum_over_warp(sums);
      if (lane != 0) continue;
      q[i] = squares;
      s[i] = sums;
    }
  }
}

template <class View>
__global__ void __launch_bounds__(kThreads)
    release_classes(View head, BatchView<typename View::Factor> batch, std::int32_t* refused) {
  for (i64 n = thread_in_grid(); n < batch.distinct(); n += grid_threads()) head.slots[batch.ids[n]] = kNoSlot;
  if (thread_in_grid() != 0) return;
  batch.header->version = head.header->version;
  if (refused && batch.header->refused) *refused = 1;
}

__global__ void __launch_bounds__(kThreads)
    take_gradients(const double* grad_A, const double* grad_q, const double* grad_s, i64 examples, i64 targets,
                   const int* example, double* to_A, double* to_q, double* to_s, Report report) {
  for (i64 n = thread_in_grid(); n < targets + examples; n += grid_threads()) {
    if (n < targets) {
      if (example[n] >= 0 && !is_finite(grad_A[n])) report(Fault::non_finite, Argument::grad_A, n, 0, 0);
      to_A[n] = grad_A[n];
      continue;
    }
    const i64 i = n - targets;
    if (!is_finite(grad_q[i])) report(Fault::non_finite, Argument::grad_q, i, 0, 0);
    if (!is_finite(grad_s[i])) report(Fault::non_finite, Argument::grad_s, i, 0, 0);
    to_q[i] = grad_q[i];
    to_s[i] = grad_s[i];
  }
}

// X = S'R of the batch, and so dL/dH. A block an example.
template <class View>
__global__ void __launch_bounds__(kThreads)
    gradient_by_rows(View head, BatchView<typename View::Factor> batch, AnyMatrix grad_hidden, std::int32_t* refused) {
  using Factor = typename View::Factor;
  const i64 width = head.width;
  for (i64 i = blockIdx.x; i < batch.examples; i += gridDim.x) {
    const RowTargets row = batch.of_example[i];
    for (i64 k = threadIdx.x; k < width; k += blockDim.x) {
      double x = 2 * batch.grad_q[i] * static_cast<double>(batch.hidden_squares[i * width + k]) +
                 batch.grad_s[i] * head.sums[k];
      for (i64 t = row.begin; t < row.end; ++t)
        x += batch.grad_A[t] * static_cast<double>(batch.rows[static_cast<i64>(batch.row[t]) * width + k]);
      batch.by_rows[i * width + k] = static_cast<Factor>(x);
      if (grad_hidden.data && k < head.features) put_number(grad_hidden, i, k, x);
    }
  }
  if (thread_in_grid() != 0) return;
  batch.header->complete = 1;
  if (refused && batch.header->refused) *refused = 1;
}

struct FetchScratch {
  PlaceTable* table;
  i64 *ids, *to;
};
FetchScratch take_rows_scratch(Scratch& scratch, const ExactRows& args) {
  FetchScratch s{};
  s.table = scratch.take<PlaceTable>(1);
  s.ids = scratch.take<i64>(args.n);
  s.to = scratch.take<i64>(args.n);
  return s;
}

void fill(const Device& device, void* at, int byte, i64 bytes) {
  if (bytes > 0)
    WIDEHEAD_CUDA_CHECK(
        cudaMemsetAsync(at, byte, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(device.stream)));
}

i64 targets_of(const Labels& target) { return target.indptr ? target.size : target.rows; }

template <class Row, class Factor>
void forward_as(const ExactForward& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.head.device;
  const View head = view_of<Row, Factor>(args.head);
  const auto batch = batch_of<Factor>(args, args.hidden.rows, targets_of(args.target));
  fill(device, batch.header, 0, reinterpret_cast<char*>(batch.places + 1) - reinterpret_cast<char*>(batch.header));
  if (batch.examples == 0) return;
  fill(device, batch.example, 0xFF, batch.targets * static_cast<i64>(sizeof(int)));
  fill(device, args.A, 0xFF, batch.targets * static_cast<i64>(sizeof(double)));  // NaN
  const Report report{device.faults, &batch.header->refused};
  LossOptions none;
  none.ignore_index = args.ignore_index;
  Labels target = args.target;
  target.values = nullptr;
  prepare_targets(device, target, none, report, batch.of_example);
  launch(device, blocks_for(batch.examples * head.features, 4 * kThreads), kThreads, 0, convert_rows<Factor>,
         args.hidden, batch.examples, batch.hidden, head.features);
  // As products take it: a large number of float64 may be infinite there.
  check_finite(device, matrix(batch.hidden, batch.examples, head.features), Argument::hidden, report);
  if (batch.targets > 0) {
    launch(device, blocks_for(batch.examples, kThreads / 32), kThreads, 0, claim_classes, batch.of_example,
           batch.examples, args.target.indices, batch.example, head.slots);
    const DistinctTargets<View> source{head, batch, args.target.indices};
    group_by_place(device, source, batch.targets, tile_rows(device, head.width, sizeof(Factor)), batch.places);
    launch_advance(device, FetchForBatch<View>{{head, batch.places, batch.ids}, batch.rows},
                   at_most(batch.targets, batch.targets / kTileRows + kPlaces));
  }
  launch_product(device, HiddenSquares<View>{head, batch}, batch.examples, head.width);
  launch(device, blocks_for(batch.targets + batch.examples, kThreads / 32), kThreads, 0, outputs<View>, head, batch,
         args.target.indices, args.A, args.q, args.s);
  launch(device, blocks_for(batch.targets, kThreads), kThreads, 0, release_classes<View>, head, batch, device.refused);
}

template <class Row, class Factor>
void backward_as(const ExactBackward& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.head.device;
  const View head = view_of<Row, Factor>(args.head);
  const auto batch = batch_of<Factor>(args, args.examples, args.targets);
  const Report report{device.faults, &batch.header->refused};
  launch(device, blocks_for(args.targets + args.examples, kThreads), kThreads, 0, take_gradients, args.grad_A,
         args.grad_q, args.grad_s, args.examples, args.targets, batch.example, batch.grad_A, batch.grad_q, batch.grad_s,
         report);
  launch(device, blocks_for(args.examples, 1), static_cast<unsigned>(at_most(kThreads, round_up(head.width, 32))), 0,
         gradient_by_rows<View>, head, batch, args.grad_hidden, device.refused);
}

template <class Row, class Factor>
void rows_as(const ExactRows& args, const FetchScratch& s) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.head.device;
  const View head = view_of<Row, Factor>(args.head);
  clear(device, s.table);
  const AnyRows<View> source{head, args.ids, args.n, s.ids, s.to, args.out, {device.faults, device.refused}};
  group_by_place(device, source, args.n, tile_rows(device, head.width, sizeof(Factor)), s.table);
  launch_advance(device, FetchOut<View>{{head, s.table, s.ids}, s.to, args.out},
                 at_most(args.n, args.n / kTileRows + kPlaces));
}

}  // namespace

i64 exact_batch_bytes(const ExactDevice& head, i64 examples, i64 targets) {
  Scratch memory;
  const i64 d = head.weight.cols, width = d * (head.velocity ? 2 : 1);
  by_exact_types(head, [&](auto, auto factor) { BatchView<decltype(factor)>(examples, targets, d, width, memory); });
  return memory.used();
}

void exact_forward(const ExactForward& args) {
  const DeviceGuard guard(args.head.device);
  by_exact_types(args.head, [&](auto row, auto factor) { forward_as<decltype(row), decltype(factor)>(args); });
}

void exact_backward(const ExactBackward& args) {
  const DeviceGuard guard(args.head.device);
  if (args.examples == 0) return;
  by_exact_types(args.head, [&](auto row, auto factor) { backward_as<decltype(row), decltype(factor)>(args); });
}

i64 scratch_bytes(const ExactRows& args) {
  Scratch scratch;
  take_rows_scratch(scratch, args);
  return scratch.used();
}

void exact_rows(const ExactRows& args) {
  const DeviceGuard guard(args.head.device);
  if (args.n == 0) return;
  Scratch scratch(args.head.device);
  const FetchScratch s = take_rows_scratch(scratch, args);
  by_exact_types(args.head, [&](auto row, auto factor) { rows_as<decltype(row), decltype(factor)>(args, s); });
}

}  // namespace widehead::cuda
