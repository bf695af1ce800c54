// exact_log.cu -- the log of step matrices on CUDA: what goes up when a level is full, and bringing rows together
#include "cuda/backend.h"
#include "cuda/exact_places.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Keeps a matrix as it is once that is smaller than its difference to I; returns whether it still is the difference. By
// a block.
template <class Factor>
__device__ inline bool settle(Factor* matrix, i64 width, double* warps) {
  double trace = 0;
  for (i64 k = threadIdx.x; k < width; k += kThreads) trace += static_cast<double>(matrix[k * (width + 1)]);
  trace = sum_over_warp(trace);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = trace;
  __syncthreads();
  trace = 0;
  for (int w = 0; w < kWarps; ++w) trace += warps[w];
  if (trace >= -0.5 * static_cast<double>(width)) return true;
  for (i64 k = threadIdx.x; k < width; k += kThreads) matrix[k * (width + 1)] += Factor{1};
  return false;
}

// A block a matrix of level 0.
template <class View>
__global__ void __launch_bounds__(kThreads) settle_steps(View head, const StepPlan* plan) {
  __shared__ double warps[kWarps];
  const int z = static_cast<int>(blockIdx.x);
  if (!plan->go || z > plan->before.count) return;
  bool beside = z == plan->before.count || head.beside_identity(0, z);
  if (beside) beside = settle(head.matrix(0, z), head.width, warps);
  if (threadIdx.x == 0) head.header->beside_identity[matrix_index(0, z)] = beside;
}

// A block a matrix of the level that an interval came into. The last kernel of a step, so it counts it.
template <class View>
__global__ void __launch_bounds__(kThreads)
    end_step(View head, const StepPlan* plan, const PlaceTable* moved, const PlaceTable* fetched) {
  __shared__ double warps[kWarps];
  if (plan->go && thread_in_grid() == 0) {
    ExactHeader& h = *head.header;
    h.steps = plan->after.now();
    ++h.version;
    ++h.taken;
    h.fetched += fetched->starts[kPlaces];
    h.moved += moved->starts[kPlaces];
  }
  const int level = plan->carries, index = static_cast<int>(blockIdx.x);
  if (!plan->go || level == 0 || index > plan->before.digit(level)) return;
  bool beside = index == plan->before.digit(level) || head.beside_identity(level, index);
  for (int below = 0; below < level; ++below) beside = beside && head.beside_identity(below, 0);
  if (beside) beside = settle(head.matrix(level, index), head.width, warps);
  if (threadIdx.x == 0) head.header->beside_identity[matrix_index(level, index)] = beside;
}

// Classes whose label lies within the interval that goes up, not at its start.
template <class View>
struct LeftBehind {
  static constexpr bool kSkips = true;
  View head;
  const StepPlan* plan;

  __device__ bool due() const { return plan->go && plan->carries > 0; }
  __device__ i64 items() const { return head.classes; }
  __device__ i64 start() const { return plan->after.now() - (i64{1} << (kDigitBits * plan->carries)); }
  __device__ bool skips(i64 chunk) const { return head.chunk_last[chunk] <= start(); }
  __device__ int place(i64 id) const {
    const i64 label = head.labels[id];
    return label > start() && label < plan->after.now() ? plan->after.place(label) : -1;
  }
  __device__ void put(i64 id, i64 n) const { head.list[n] = static_cast<std::uint32_t>(id); }
};

template <class View>
struct MoveRows {
  using Factor = typename View::Factor;
  View head;
  const StepPlan* plan;
  const PlaceTable* table;

  __device__ bool due() const { return plan->go && plan->carries > 0; }
  __device__ LogTime time() const { return plan->after; }
  __device__ i64 tiles(int) const { return table->tiles[kPlaces]; }
  __device__ RowTile tile(i64 number, int rows) const { return tile_of(*table, number, rows); }
  __device__ bool unit(const RowTile&) const { return false; }
  __device__ i64 own(const RowTile&, int) const { return 0; }
  __device__ Factor load(const RowTile& tile, int r, i64 k) const {
    return static_cast<Factor>(head.stored(head.list[tile.first + r], k));
  }
  __device__ void store(const RowTile& tile, int r, i64 k, Factor x) const {
    head.stored(head.list[tile.first + r], k) = static_cast<typename View::Row>(x);
  }
  __device__ void done(const RowTile& tile, int r) const {
    const i64 id = head.list[tile.first + r];
    head.labels[id] = head.chunk_last[id / kChunk] = static_cast<std::uint32_t>(plan->after.now());
  }
};

// The whole of the full levels comes to the level above as an interval, and its matrices take it: their rows are
// multiplied by the first matrix of each full level. A tile's owner is one of its matrices.
template <class View>
struct MergeIntervals {
  using Factor = typename View::Factor;
  View head;
  const StepPlan* plan;

  __device__ bool due() const { return plan->go && plan->carries > 0; }
  __device__ LogTime time() const { return plan->after; }
  __device__ int fresh() const { return plan->before.digit(plan->carries); }
  __device__ i64 tiles(int rows) const { return (fresh() + 1) * ceil_div(head.width, rows); }
  __device__ RowTile tile(i64 number, int rows) const {
    const i64 each = ceil_div(head.width, rows), row = number % each * rows;
    return {row, static_cast<int>(at_most(rows, head.width - row)), plan->carries - 1, 0,
            static_cast<int>(number / each)};
  }
  __device__ bool unit(const RowTile& tile) const {
    return tile.owner == fresh() || head.beside_identity(plan->carries, tile.owner);
  }
  __device__ i64 own(const RowTile& tile, int r) const { return tile.first + r; }
  __device__ Factor load(const RowTile& tile, int r, i64 k) const {
    if (tile.owner == fresh()) return 0;
    return head.matrix(plan->carries, tile.owner)[(tile.first + r) * head.width + k];
  }
  __device__ void store(const RowTile& tile, int r, i64 k, Factor x) const {
    head.matrix(plan->carries, tile.owner)[(tile.first + r) * head.width + k] = x;
  }
  __device__ void done(const RowTile&, int) const {}
};

template <class View>
struct AllRows {
  static constexpr bool kSkips = false;
  View head;

  __device__ bool due() const { return head.header->steps > 0; }
  __device__ i64 items() const { return head.classes; }
  __device__ int place(i64 id) const { return LogTime::of(head.header->steps).place(head.labels[id]); }
  __device__ void put(i64 id, i64 n) const { head.list[n] = static_cast<std::uint32_t>(id); }
};

template <class View>
struct BringTogether {
  using Factor = typename View::Factor;
  View head;
  const PlaceTable* table;

  __device__ bool due() const { return head.header->steps > 0; }
  __device__ LogTime time() const { return LogTime::of(head.header->steps); }
  __device__ i64 tiles(int) const { return table->tiles[kPlaces]; }
  __device__ RowTile tile(i64 number, int rows) const { return tile_of(*table, number, rows); }
  __device__ bool unit(const RowTile&) const { return false; }
  __device__ i64 own(const RowTile&, int) const { return 0; }
  __device__ Factor load(const RowTile& tile, int r, i64 k) const {
    return static_cast<Factor>(head.stored(head.list[tile.first + r], k));
  }
  __device__ void store(const RowTile& tile, int r, i64 k, Factor x) const {
    const auto now = static_cast<Factor>(static_cast<double>(x) + head.omega[k]);
    head.stored(head.list[tile.first + r], k) = static_cast<typename View::Row>(now);
  }
  __device__ void done(const RowTile& tile, int r) const { head.labels[head.list[tile.first + r]] = 0; }
};

template <class View>
__global__ void __launch_bounds__(kThreads) clear_log(View head) {
  for (i64 k = thread_in_grid(); k < head.width; k += grid_threads()) head.omega[k] = 0;
  for (i64 n = thread_in_grid(); n * kChunk < head.classes; n += grid_threads()) head.chunk_last[n] = 0;
  if (thread_in_grid() == 0) head.header->steps = 0;
}

template <class Row, class Factor>
void consolidate_as(const ExactDevice& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.device;
  const View head = view_of<Row, Factor>(args);
  Scratch scratch(device);
  auto* const table = scratch.take<PlaceTable>(1);
  clear(device, table);
  group_by_place(device, AllRows<View>{head}, head.classes, tile_rows(device, head.width, sizeof(Factor)), table);
  launch_advance(device, BringTogether<View>{head, table}, head.classes / kTileRows + kPlaces);
  launch(device, blocks_for(at_least(head.width, ceil_div(head.classes, kChunk)), kThreads), kThreads, 0,
         clear_log<View>, head);
}

}  // namespace

template <class Row, class Factor>
void settle_group(const Device& device, const ExactView<Row, Factor>& head, const StepPlan* plan) {
  launch(device, kRadix, kThreads, 0, settle_steps<ExactView<Row, Factor>>, head, plan);
}

template <class Row, class Factor>
void advance_log(const Device& device, const ExactView<Row, Factor>& head, const StepPlan* plan, PlaceTable* places,
                 const BatchView<Factor>& batch) {
  using View = ExactView<Row, Factor>;
  const int rows = tile_rows(device, head.width, sizeof(Factor));
  group_by_place(device, LeftBehind<View>{head, plan}, head.classes, rows, places);
  launch_advance(device, MoveRows<View>{head, plan, places}, head.classes / kTileRows + kPlaces);
  launch_advance(device, MergeIntervals<View>{head, plan}, (kRadix - 1) * ceil_div(head.width, rows));
  launch(device, kRadix - 1, kThreads, 0, end_step<View>, head, plan, places, batch.places);
}

#define WIDEHEAD_EXACT_LOG(Row, Factor)                                                                 \
  template void settle_group(const Device&, const ExactView<Row, Factor>&, const StepPlan*);            \
  template void advance_log(const Device&, const ExactView<Row, Factor>&, const StepPlan*, PlaceTable*, \
                            const BatchView<Factor>&);
WIDEHEAD_EXACT_LOG(float, float)
WIDEHEAD_EXACT_LOG(float, double)
WIDEHEAD_EXACT_LOG(double, double)
#undef WIDEHEAD_EXACT_LOG

i64 exact_consolidate_scratch(const ExactDevice&) {
  Scratch scratch;
  scratch.take<PlaceTable>(1);
  return scratch.used();
}

void exact_consolidate(const ExactDevice& head) {
  const DeviceGuard guard(head.device);
  by_exact_types(head, [&](auto row, auto factor) { consolidate_as<decltype(row), decltype(factor)>(head); });
}

}  // namespace widehead::cuda
