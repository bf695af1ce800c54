// exact_gram.cu -- the exact head's state on CUDA from rows that are W: R'R and R'1, and an empty log
#include "cuda/backend.h"
#include "cuda/exact_product.h"
#include "cuda/exact_state.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class View>
__global__ void __launch_bounds__(kThreads) clear_state(View head) {
  for (i64 id = thread_in_grid(); id < head.classes; id += grid_threads()) {
    head.labels[id] = 0;
    head.slots[id] = kNoSlot;
  }
  for (i64 n = thread_in_grid(); n * kChunk < head.classes; n += grid_threads()) head.chunk_last[n] = 0;
  for (i64 k = thread_in_grid(); k < head.width; k += grid_threads()) head.omega[k] = 0;
  if (thread_in_grid() == 0) {
    // Batches of before are stale by this.
    const i64 version = head.header->version + 1;
    *head.header = ExactHeader{};
    head.header->version = version;
  }
}

// Rows are summed in parts, and these in order.
struct Parts {
  i64 count, rows;  // of each
  double* squares;  // [count, width, width], the lower half
  double* sums;     // [count, width]

  Parts(const ExactDevice& head, Scratch& scratch) {
    const i64 width = head.weight.cols * (head.velocity ? 2 : 1), side = ceil_div(width, kProductTile);
    const i64 wanted = ceil_div(8 * hardware(head.device.index).processors, side * (side + 1) / 2);
    rows = at_least(512, ceil_div(head.weight.rows, at_most(wanted, 256)));
    count = ceil_div(head.weight.rows, rows);
    squares = scratch.take<double>(count * width * width);
    sums = scratch.take<double>(count * width);
  }
};

template <class View>
struct SumSquares {
  using Factor = double;
  static constexpr bool kRowsByDepth = false, kColumnsByDepth = false;
  View head;
  Parts parts;

  __device__ Extent extent(int z) const {
    return extent_of(head.width, head.width, at_most(parts.rows, head.classes - z * parts.rows));
  }
  __device__ bool skips(int row, int column) const { return column > row; }
  __device__ double a(int z, int i, int k) const { return static_cast<double>(head.stored(z * parts.rows + k, i)); }
  __device__ double b(int z, int k, int j) const { return a(z, j, k); }
  __device__ void store(int z, int i, int j, double x) const {
    parts.squares[(z * head.width + i) * head.width + j] = x;
  }
};

// 32 columns of a part a block.
template <class View>
__global__ void __launch_bounds__(kThreads) sum_rows(View head, Parts parts) {
  __shared__ double sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const i64 k = static_cast<i64>(blockIdx.x) * 32 + lane, first = blockIdx.y * parts.rows;
  double sum = 0;
  if (k < head.width)
    for (i64 r = first + warp; r < at_most(head.classes, first + parts.rows); r += kWarps)
      sum += static_cast<double>(head.stored(r, k));
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || k >= head.width) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  parts.sums[blockIdx.y * head.width + k] = sum;
}

template <class View>
__global__ void __launch_bounds__(kThreads) join_parts(View head, Parts parts) {
  const i64 width = head.width, entries = width * width;
  for (i64 n = thread_in_grid(); n < entries + width; n += grid_threads()) {
    const bool square = n < entries;
    if (square && n % width > n / width) continue;
    const double* const from = square ? parts.squares + n : parts.sums + (n - entries);
    double sum = 0;
    for (i64 p = 0; p < parts.count; ++p) sum += from[p * (square ? entries : width)];
    if (square) {
      head.squares[n] = head.squares[n % width * width + n / width] = sum;
    } else {
      head.sums[n - entries] = sum;
    }
  }
}

template <class View>
__global__ void count_up(View head, double* numbers) {
  const i64 lane = threadIdx.x;
  double norm = 0;
  for (i64 k = lane; k < head.features; k += 32) norm += head.squares[k * (head.width + 1)];
  norm = sum_over_warp(norm);
  if (lane != 0) return;
  const ExactHeader& h = *head.header;
  int matrices = 0;
  for (int level = 0; level < kLevels; ++level) matrices += LogTime::of(h.steps).digit(level);
  const double all[kExactDiagnostics] = {static_cast<double>(h.steps),  static_cast<double>(h.taken),
                                         static_cast<double>(matrices), static_cast<double>(h.fetched),
                                         static_cast<double>(h.moved),  norm};
  for (int i = 0; i < kExactDiagnostics; ++i) numbers[i] = all[i];
}

template <class Row, class Factor>
void init_as(const ExactDevice& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.device;
  const View head = view_of<Row, Factor>(args);
  Scratch scratch(device);
  const Parts parts(args, scratch);
  const Report report{device.faults, device.refused};
  check_finite(device, args.weight, Argument::weight, report);
  if (args.velocity) check_finite(device, args.velocity, Argument::velocity, report);
  launch(device, blocks_for(at_least(head.classes, head.width), kThreads), kThreads, 0, clear_state<View>, head);
  launch_product(device, SumSquares<View>{head, parts}, head.width, head.width, static_cast<unsigned>(parts.count));
  const dim3 grid(static_cast<unsigned>(ceil_div(head.width, 32)), static_cast<unsigned>(parts.count));
  launch(device, grid, kThreads, 0, sum_rows<View>, head, parts);
  launch(device, blocks_for(head.width * (head.width + 1), kThreads), kThreads, 0, join_parts<View>, head, parts);
}

}  // namespace

i64 exact_state_bytes(const ExactDevice& head) {
  Scratch memory;
  by_exact_types(head, [&](auto row, auto factor) {
    const ExactView<decltype(row), decltype(factor)> view(head, memory);
    tile_rows(head.device, view.width, sizeof factor);  // throws where there are too many columns
  });
  return memory.used();
}

i64 exact_init_scratch(const ExactDevice& head) {
  Scratch scratch;
  const Parts parts(head, scratch);
  return scratch.used();
}

void exact_init(const ExactDevice& head) {
  const DeviceGuard guard(head.device);
  by_exact_types(head, [&](auto row, auto factor) { init_as<decltype(row), decltype(factor)>(head); });
}

void exact_gram(const ExactDevice& args, double* squares, double* sums) {
  const DeviceGuard guard(args.device);
  by_exact_types(args, [&](auto row, auto factor) {
    const auto head = view_of<decltype(row), decltype(factor)>(args);
    const auto copy = [&](double* to, const double* from, i64 n) {
      if (to)
        WIDEHEAD_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<std::size_t>(n) * sizeof *to, cudaMemcpyDefault,
                                            static_cast<cudaStream_t>(args.device.stream)));
    };
    copy(squares, head.squares, head.width * head.width);
    copy(sums, head.sums, head.width);
  });
}

void exact_diagnostics(const ExactDevice& args, double* numbers) {
  const DeviceGuard guard(args.device);
  by_exact_types(args, [&](auto row, auto factor) {
    using View = ExactView<decltype(row), decltype(factor)>;
    const View head = view_of<decltype(row), decltype(factor)>(args);
    launch(args.device, 1, 32, 0, count_up<View>, head, numbers);
  });
}

}  // namespace widehead::cuda
