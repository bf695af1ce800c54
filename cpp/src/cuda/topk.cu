// topk.cu -- the best classes of each example: logits tile by tile, and what is best of them kept in lists
//
// A tile Z [rows, tile] stays in the L2 cache. Its columns are cut into `slots` pieces, the same for all tiles, so that small
// batches fill the card too; every (slot, row) is an item with a sorted list of its best `width`. A logit that beats the
// list's last waits in a buffer, and only a full buffer is sorted into the list: after the first tiles that is rare, and
// most logits cost one comparison. At the end the lists of a row are joined. More than kWidth classes take several passes,
// each for what comes after the one before it. The order of (score, class) is total, so the results do not depend on tiles.
#include <cmath>
#include <optional>
#include <string>

#include "cuda/backend.h"
#include "cuda/convert.h"
#include "cuda/cublas.h"
#include "cuda/exclude.h"
#include "cuda/intrinsics.h"
#include "cuda/launch.h"
#include "cuda/topk.h"
#include "cuda/topk_scan.h"
#include "widehead/error.h"

namespace widehead::cuda {
namespace {

constexpr int kWidth = 1024;                 // longest list
constexpr i64 kMostRows = 8192;              // of the batch at a time
constexpr i64 kMostColumns = i64{64} << 10;  // of a tile
constexpr i64 kListBytes = i64{128} << 20;   // of all lists

// One warp an item. The warps of a block meet only when a buffer is full, to sort it together, and at the end.
template <class Real, bool kSum>
__global__ void __launch_bounds__(kThreads, 16 / sizeof(Real)) select_best(Selection<Real> a) {
  __shared__ ItemState<Real> states[kWarps];
  __shared__ int full[kWarps];
  auto* sorted = reinterpret_cast<Entry<Real>*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_item = static_cast<int>(blockIdx.x) * a.items_a_block, item = first_item + warp;
  const bool exists = warp < a.items_a_block && item < a.rows * a.slots;
  Scan<Real> s = begin_scan(a, item, exists);
  const Real* z = a.z + s.row * a.stride;
  OnlineSum<Real> sum;
  for (;;) {
    bool merge = false;
    while (s.column < s.end && !merge) {
      if (s.part < 0) {
        Real v[kParts<Real> * kVector];
        read_logits<kParts<Real>>(a, z, s.column, s.end, v);
        Real top = v[0];
#pragma unroll
        for (int i = 1; i < kParts<Real> * kVector; ++i) top = std::fmax(top, v[i]);
        if constexpr (kSum) {
          const Real base = sum.raise(top);
          Real part = 0;
#pragma unroll
          for (int i = 0; i < kParts<Real> * kVector; ++i) part += exp_term(v[i] - base);
          sum.sum += part;
        }
        if (!__any_sync(~0u, top > s.state.last)) {
          s.column += kStep<Real>;
          continue;
        }
        s.part = 0;
      }
      while (s.part < kParts<Real> && !merge) {
        merge = !collect_part(a, z, s);
        if (!merge) ++s.part;
      }
      if (!merge) {
        s.column += kStep<Real>;
        s.part = -1;
      }
    }
    merge = merge || (a.last && s.state.waiting > 0);
    if (lane == 0) {
      full[warp] = merge;
      states[warp] = s.state;
    }
    if (!__syncthreads_or(merge)) break;
    unsigned which = 0;
    for (int w = 0; w < kWarps; ++w) which |= static_cast<unsigned>(full[w]) << w;
    for (int w = 0; w < kWarps; ++w)
      if (which >> w & 1) merge_item(a.lists, first_item + w, states[w], sorted);
    s.state = states[warp];
    __syncwarp();
  }
  if constexpr (kSum) sum.add_lanes();
  if (!exists || lane != 0) return;
  a.lists.states[item] = s.state;
  if constexpr (kSum) {
    OnlineSum<double> total;
    if (!a.fresh) total = a.lists.sums[item];
    total.add(static_cast<double>(sum.top), static_cast<double>(sum.sum));
    a.lists.sums[item] = total;
  }
}

// A block a row: joins the lists of its slots and writes results [done, upto).
template <class Real>
__global__ void __launch_bounds__(kThreads) join_slots(Selection<Real> a, i64 upto, Real* lse) {
  __shared__ int next_free;
  const Lists<Real>& lists = a.lists;
  auto* sorted = reinterpret_cast<Entry<Real>*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, row = static_cast<int>(blockIdx.x);
  const auto item = [&](int slot) { return slot * a.rows + row; };
  const int filled = lists.states[row].filled;
  for (int i = thread; i < lists.room; i += kThreads)
    sorted[i] = i < filled ? lists.best[static_cast<i64>(row) * lists.width + i] : no_entry<Real>();
  if (thread == 0) next_free = 0;
  __syncthreads();

  int waiting = 0;
  const auto merge = [&] {
    for (int i = waiting + thread; i < lists.room; i += kThreads) sorted[lists.room + i] = no_entry<Real>();
    if (thread == 0) next_free = 0;
    __syncthreads();
    keep_best_half(sorted, lists.room);
    waiting = 0;
  };
  // All lists' first entries, then all second ones, and so on. A round sees at least one of each list: when none is good
  // enough, nothing behind them is.
  const int others = a.slots - 1, round = kThreads < lists.room ? kThreads : lists.room, n = others * lists.width;
  Entry<Real> last = sorted[lists.width - 1];
  for (int begin = 0; begin < n; begin += round) {
    const int i = begin + thread, from = item(1 + i % others), at = i / others;
    Entry<Real> x = no_entry<Real>();
    if (thread < round && i < n && at < lists.states[from].filled)
      x = lists.best[static_cast<i64>(from) * lists.width + at];
    bool taken = better(x, last);
    int found = __syncthreads_count(taken);
    if (found > 0 && waiting + found > lists.room) {
      merge();
      last = sorted[lists.width - 1];
      taken = better(x, last);
      found = __syncthreads_count(taken);
    }
    if (found == 0) break;
    const unsigned lanes = __ballot_sync(~0u, taken);
    int to = 0;
    if (lane == 0) to = atomicAdd(&next_free, __popc(lanes));
    to = __shfl_sync(~0u, to, 0) + __popc(lanes & ((1u << lane) - 1));
    if (taken) sorted[lists.room + to] = x;
    waiting += found;
  }
  __syncthreads();
  if (waiting > 0) merge();

  for (i64 i = thread; i < upto - a.done; i += kThreads) {
    const Entry<Real> x = i < lists.width ? sorted[i] : no_entry<Real>();
    a.scores[row * a.scores_stride + a.done + i] = x.score;
    a.classes[row * a.classes_stride + a.done + i] = x.cls == kNoClass ? -1 : static_cast<i64>(x.cls);
  }
  if (!lse || thread >= 32) return;
  OnlineSum<double> total;
  for (int slot = lane; slot < a.slots; slot += 32) {
    const OnlineSum<double> part = lists.sums[item(slot)];
    total.add(part.top, part.sum);
  }
  total.add_lanes();
  if (lane == 0) lse[row] = static_cast<Real>(total.top + std::log(total.sum));
}

// Sizes; they follow from shapes and the hardware alone.
template <class Real>
struct Plan {
  i64 rows, tile, slots, piece, total, width, room;

  Plan(const DenseTopK& args, i64 most_rows) {
    const Hardware& card = hardware(args.device.index);
    const i64 classes = args.layer.weight.rows, cells = card.l2_bytes / 2 / static_cast<i64>(sizeof(Real));
    total = at_most(args.k, classes);
    width = at_most(total, kWidth);
    for (room = kPart; room < width; room *= 2) continue;
    const i64 list_bytes = (width + room) * static_cast<i64>(sizeof(Entry<Real>));
    rows = at_most(at_most(args.layer.hidden.rows, at_most(kMostRows, most_rows)),
                   at_most(cells / 64, kListBytes / list_bytes));
    rows = at_least(rows, 1);
    const i64 fit = at_most(cells / rows, kMostColumns), grain = fit < 256 ? 64 : 256;
    tile = at_most(at_least(fit / grain * grain, 64), round_up(classes, 64));
    // join_slots takes an entry of each list a round.
    slots = at_least(1, at_most(at_most(ceil_div(16 * card.processors, rows), tile / kStep<Real>), kPart));
    piece = round_up(ceil_div(tile, slots), kPart);
    slots = ceil_div(tile, piece);
  }
};

template <class Real>
struct TopKScratch {
  Real* z;
  Lists<Real> lists;
  std::uint32_t* excluded;
  std::int32_t* bad;

  TopKScratch(const DenseTopK& args, const Plan<Real>& plan, Scratch& scratch)
      : z(scratch.take<Real>(plan.rows * plan.tile)) {
    const i64 items = plan.rows * plan.slots;
    lists.width = static_cast<int>(plan.width);
    lists.room = static_cast<int>(plan.room);
    lists.best = scratch.take<Entry<Real>>(items * plan.width);
    lists.waiting = scratch.take<Entry<Real>>(items * plan.room);
    lists.states = scratch.take<ItemState<Real>>(items);
    lists.sums = args.lse ? scratch.take<OnlineSum<double>>(items) : nullptr;
    excluded = scratch.take<std::uint32_t>(args.exclude_indptr ? 2 * args.exclude_size : 0);
    bad = scratch.take<std::int32_t>(1);
  }
};

template <class Real>
class TopKCall {
 public:
  TopKCall(const DenseTopK& args, LogitSource& source, Scratch& scratch)
      : args_(args), source_(source), plan_(args, source.most_rows()), scratch_(args, plan_, scratch) {
    source.take(plan_.rows, scratch);
  }

  void run() {
    excluded_ = exclude(args_, scratch_.excluded, scratch_.bad);
    for (i64 first = 0; first < args_.layer.hidden.rows; first += plan_.rows) {
      const i64 rows = at_most(plan_.rows, args_.layer.hidden.rows - first);
      source_.begin(first, rows);
      for (i64 done = 0; done < plan_.total; done += plan_.width) pass(first, rows, done);
    }
  }

 private:
  void pass(i64 first_row, i64 rows, i64 done) const {
    const DenseLayer& layer = args_.layer;
    Selection<Real> a{};
    a.z = scratch_.z;
    a.stride = plan_.tile;
    a.first_row = first_row;
    a.rows = static_cast<int>(rows);
    a.slots = static_cast<int>(plan_.slots);
    a.piece = static_cast<int>(plan_.piece);
    a.bias = layer.bias;
    a.softcap = static_cast<Real>(args_.softcap);
    a.offset = layer.offset;
    a.excluded = excluded_;
    a.lists = scratch_.lists;
    a.lists.width = static_cast<int>(at_most(plan_.width, plan_.total - done));
    a.scores = static_cast<Real*>(args_.scores.data) + first_row * args_.scores.stride;
    a.scores_stride = args_.scores.stride;
    a.classes = args_.classes.data + first_row * args_.classes.stride;
    a.classes_stride = args_.classes.stride;
    a.done = done;
    const bool sum = args_.lse && done == 0;
    for (i64 c = 0; c < layer.weight.rows; c += plan_.tile) tile(a, c, sum);
    const bool end = done + a.lists.width == plan_.total;
    Real* lse = sum ? static_cast<Real*>(args_.lse.data) + first_row : nullptr;
    launch(args_.device, static_cast<unsigned>(rows), kThreads, sorting_bytes(), join_slots<Real>, a,
           end ? args_.k : done + a.lists.width, lse);
  }

  void tile(Selection<Real>& a, i64 first, bool sum) const {
    const DenseLayer& layer = args_.layer;
    const i64 cols = at_most(plan_.tile, layer.weight.rows - first);
    source_.tile(first, cols, scratch_.z, plan_.tile);
    a.first = first;
    a.cols = static_cast<int>(cols);
    const std::size_t aligned = size_of(layer.bias.dtype) == 2 ? alignof(Four<bf16>) : alignof(Four<Real>);
    a.bias_vectors = cols % kVector == 0 && reinterpret_cast<std::uintptr_t>(layer.bias.data) % aligned == 0;
    a.fresh = first == 0;
    a.last = first + cols == layer.weight.rows;
    const i64 items = static_cast<i64>(a.rows) * a.slots, processors = hardware(args_.device.index).processors;
    a.items_a_block = static_cast<int>(at_least(1, at_most(ceil_div(items, 4 * processors), kWarps)));
    const auto blocks = static_cast<unsigned>(ceil_div(items, a.items_a_block));
    launch(args_.device, blocks, kThreads, sorting_bytes(), sum ? select_best<Real, true> : select_best<Real, false>,
           a);
  }

  std::size_t sorting_bytes() const { return static_cast<std::size_t>(2 * plan_.room) * sizeof(Entry<Real>); }

  const DenseTopK& args_;
  LogitSource& source_;
  Plan<Real> plan_;
  TopKScratch<Real> scratch_;
  Excluded excluded_;
};

template <class Real>
void select_as(const DenseTopK& args, LogitSource& source, Scratch& scratch) {
  TopKCall<Real> call(args, source, scratch);
  if (scratch.real()) call.run();
}

// Products by cuBLAS.
class DenseLogitSource : public LogitSource {
 public:
  explicit DenseLogitSource(const DenseTopK& args) : layer_(args.layer), device_(args.device) {}

  i64 most_rows() const override { return kMostRows; }
  void take(i64 rows, Scratch& scratch) override {
    workspace_ = scratch.take<char>(kCublasWorkspace);
    room_ = take_converted(scratch, layer_.hidden, rows, layer_.weight.dtype);
  }
  void begin(i64 first, i64 rows) override {
    if (!cublas_) cublas_.emplace(device_, workspace_);
    hidden_ = as_factor(device_, layer_.hidden, first, rows, layer_.weight.dtype, room_);
    rows_ = rows;
  }
  void tile(i64 first, i64 count, void* z, i64 stride) const override {
    const ConstAnyMatrix& w = layer_.weight;
    cublas_->multiply({
        .m = rows_,
        .n = count,
        .k = w.cols,
        .a = hidden_,
        .b = {static_cast<const char*>(w.data) + first * w.stride * size_of(w.dtype), w.stride, true},
        .factors = w.dtype,
        .c = z,
        .c_stride = stride,
        .result = w.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32,
        .tf32 = layer_.tf32,
    });
  }

 private:
  const DenseLayer& layer_;
  const Device& device_;
  void *workspace_ = nullptr, *room_ = nullptr;
  std::optional<Cublas> cublas_;
  Operand hidden_{};
  i64 rows_ = 0;
};

}  // namespace

void select_topk(const DenseTopK& args, LogitSource& source, Scratch& scratch) {
  if (args.layer.weight.rows >= kNoClass)
    throw CapacityError("weight: expected fewer than " + std::to_string(kNoClass) + " classes, got " +
                        std::to_string(args.layer.weight.rows));
  if (args.layer.weight.dtype == Dtype::f64) return select_as<double>(args, source, scratch);
  select_as<float>(args, source, scratch);
}

void dense_topk(const DenseTopK& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  DenseLogitSource source(args);
  select_topk(args, source, scratch);
}

std::int64_t scratch_bytes(const DenseTopK& args) {
  if (args.layer.hidden.rows == 0) return 0;
  Scratch scratch;
  DenseLogitSource source(args);
  select_topk(args, source, scratch);
  return scratch.used();
}

}  // namespace widehead::cuda
