// rewire.cu -- moves the weakest connections of a sparse layer to other inputs
#include "cuda/backend.h"
#include "cuda/draw.h"
#include "cuda/rewire_select.h"

namespace widehead::cuda {
namespace {

using Count = unsigned long long;

constexpr int kThreads = 256;
constexpr i64 kSharedBytes = 40 << 10;  // of a row; beyond, the block has global memory

// One row of the index while a block works on it: `fan_in` numbers each.
struct Row {
  std::uint64_t* staged;  // as many as threads, if those are more: numbers of the matrices on their way
  std::int32_t* inputs;
  std::uint32_t* strengths;
  std::int32_t* place;  // among the kept ones; ~(place among the moved ones) of a moved one
  std::int32_t* kept;   // inputs that stay
  std::int32_t* drawn;  // inputs that come
  std::int32_t* next;   // all inputs of the new row,
  std::int32_t* from;   // and the column that each comes from; ~column of a moved one

  __host__ __device__ static i64 bytes(i64 fan_in, i64 threads) {
    return 8 * at_least(fan_in, threads) + 7 * 4 * fan_in;
  }
  __device__ Row(unsigned char* memory, i64 n)
      : staged(reinterpret_cast<std::uint64_t*>(memory)),
        inputs(reinterpret_cast<std::int32_t*>(staged + at_least(n, blockDim.x))),
        strengths(reinterpret_cast<std::uint32_t*>(inputs + n)),
        place(inputs + 2 * n),
        kept(inputs + 3 * n),
        drawn(inputs + 4 * n),
        next(inputs + 5 * n),
        from(inputs + 6 * n) {}
};

__device__ inline std::int32_t input_at(const Rewire& args, i64 at) {
  return args.index_dtype == Dtype::u16 ? static_cast<const std::uint16_t*>(args.index)[at]
                                        : static_cast<const std::int32_t*>(args.index)[at];
}
__device__ inline void set_input(const Rewire& args, i64 at, std::int32_t input) {
  if (args.index_dtype == Dtype::u16) {
    static_cast<std::uint16_t*>(args.index)[at] = static_cast<std::uint16_t>(input);
  } else {
    static_cast<std::int32_t*>(args.index)[at] = input;
  }
}

// How many threads before this one have the flag, and how many of the block. `warps` [32] is shared.
__device__ inline int flags_before(bool flag, int* warps, int* all) {
  const unsigned bits = __ballot_sync(~0u, flag);
  const int lane = static_cast<int>(threadIdx.x % 32), own = static_cast<int>(threadIdx.x / 32);
  __syncthreads();  // the last count has been read
  if (lane == 0) warps[own] = __popc(bits);
  __syncthreads();
  int before = __popc(bits & ((1u << lane) - 1));
  *all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
    if (w < own) before += warps[w];
    *all += warps[w];
  }
  return before;
}

__device__ inline void load_row(const Rewire& args, i64 index_row, const Row& row) {
  const i64 fan_in = args.weight.cols;
  __syncthreads();  // the last row is done
  for (i64 k = threadIdx.x; k < fan_in; k += blockDim.x) {
    row.inputs[k] = row.next[k] = input_at(args, index_row * args.index_stride + k);
    row.from[k] = static_cast<std::int32_t>(k);
    row.strengths[k] = strength(args, index_row, k);
  }
  __syncthreads();
}

__device__ inline i64 count_up_to(const Row& row, i64 fan_in, std::uint32_t bits) {
  i64 n = 0;
  for (i64 base = 0; base < fan_in; base += blockDim.x) {
    const i64 k = base + threadIdx.x;
    n += __syncthreads_count(k < fan_in && row.strengths[k] <= bits);
  }
  return n;
}

// The cut within one row for the `wanted` weakest: the least strength that so many do not exceed.
__device__ inline Cut row_cut(const Row& row, i64 fan_in, i64 wanted) {
  if (wanted == 0) return {};
  std::uint32_t low = 0, high = kStrongest;
  while (low < high) {
    const std::uint32_t mid = low + (high - low) / 2;
    if (count_up_to(row, fan_in, mid) >= wanted) {
      high = mid;
    } else {
      low = mid + 1;
    }
  }
  return {low, low == 0 ? wanted : wanted - count_up_to(row, fan_in, low - 1)};
}

// Marks what goes, and takes its ties off those that are left to go; returns how many go.
__device__ inline i64 mark(const Row& row, i64 fan_in, std::uint32_t bits, i64* ties, int* warps) {
  i64 kept = 0;
  for (i64 base = 0; base < fan_in; base += blockDim.x) {
    const i64 k = base + threadIdx.x;
    const bool here = k < fan_in;
    const std::uint32_t s = here ? row.strengths[k] : 0;
    int all_ties = 0, all_kept = 0;
    const bool tie = here && s == bits;
    const int ties_before = flags_before(tie, warps, &all_ties);
    const bool goes = s < bits || (tie && ties_before < *ties);
    const i64 kept_before = kept + flags_before(here && !goes, warps, &all_kept);
    if (here) {
      row.place[k] = static_cast<std::int32_t>(goes ? ~(k - kept_before) : kept_before);
      if (!goes) row.kept[kept_before] = row.inputs[k];
    }
    *ties -= all_ties;
    kept += all_kept;
  }
  __syncthreads();
  return fan_in - kept;
}

// The new row's inputs, ascending. An index whose rows do not ascend makes no sense here, but is not overrun.
__device__ inline void place_inputs(const Rewire& args, const RandomStream& random, i64 index_row, const Row& row,
                                    i64 n) {
  const i64 fan_in = args.weight.cols;
  // A connection should not come back to where it left; where inputs are too few for that, it may.
  const bool may_return = args.in_features - fan_in < n;
  const std::int32_t* const taken = may_return ? row.kept : row.inputs;
  const i64 count = may_return ? fan_in - n : fan_in;
  draw_ascending(Floyd{random, static_cast<std::uint64_t>(args.first_row + index_row), n, args.in_features - count},
                 row.drawn);
  for (i64 j = threadIdx.x; j < n; j += blockDim.x)
    row.drawn[j] = static_cast<std::int32_t>(free_number(taken, count, row.drawn[j]));
  __syncthreads();
  for (i64 k = threadIdx.x; k < fan_in; k += blockDim.x) {
    const std::int32_t place = row.place[k];
    const bool moves = place < 0;
    const std::int32_t input = moves ? row.drawn[~place] : row.inputs[k];
    const i64 at = moves ? ~place + count_below(row.kept, fan_in - n, input) : place + count_below(row.drawn, n, input);
    row.next[at] = input;
    row.from[at] = static_cast<std::int32_t>(moves ? ~k : k);
  }
  __syncthreads();
  for (i64 k = threadIdx.x; k < fan_in; k += blockDim.x)
    set_input(args, index_row * args.index_stride + k, row.next[k]);
}

// The same order of columns in the rows of a matrix that go with the row of the index; `keep`: values of moved ones too.
template <class T>
__device__ inline void reorder_as(const AnyMatrix& m, i64 first, i64 end, const Row& row, bool keep) {
  T* const staged = reinterpret_cast<T*>(row.staged);
  T* const data = static_cast<T*>(m.data);
  const i64 each = at_least(1, static_cast<i64>(blockDim.x) / m.cols);  // rows at a time
  for (i64 c = first; c < end; c += each) {
    const int n = static_cast<int>(at_most(each, end - c) * m.cols), cols = static_cast<int>(m.cols);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      const T* const old = data + (c + i / cols) * m.stride;
      const std::int32_t from = row.from[i % cols];
      staged[i] = from >= 0 ? old[from] : keep ? old[~from] : T{0};
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
      data[(c + i / cols) * m.stride + i % cols] = staged[i];
  }
}
__device__ inline void reorder(const AnyMatrix& m, i64 first, i64 end, const Row& row, bool keep) {
  if (!m.data) return;
  __syncthreads();  // what was staged for another matrix has been read
  switch (m.dtype) {
    case Dtype::f64: return reorder_as<std::uint64_t>(m, first, end, row, keep);
    case Dtype::f32: return reorder_as<std::uint32_t>(m, first, end, row, keep);
    default: return reorder_as<std::uint16_t>(m, first, end, row, keep);
  }
}

// A block a chunk of rows, in order, for the ties. `found` stands for `given` where the cut was found on the device.
__global__ void __launch_bounds__(kThreads)
    move_rows(Rewire args, i64 rows, Cut given, const Cut* found, const i64* ties_before, i64 of_each_row,
              unsigned char* memory, i64 memory_each, Count* moved) {
  __shared__ int warps[32];
  if (is_refused(args)) return;
  const i64 fan_in = args.weight.cols;
  const bool by_row = args.mode == RewireMode::magnitude_row;
  const Cut cut = found ? *found : given;
  const RandomStream random{args.seed, Purpose::rewire,
                            args.device_step ? static_cast<std::uint64_t>(*args.device_step) : args.step};
  const Row row(memory ? memory + static_cast<i64>(blockIdx.x) * memory_each : dynamic_shared(), fan_in);
  i64 total = 0;
  for (i64 chunk = blockIdx.x; chunk * kChunkRows < rows; chunk += gridDim.x) {
    i64 ties = found ? cut.ties - ties_before[chunk] : cut.ties;
    for (i64 r = chunk * kChunkRows; r < at_most(rows, (chunk + 1) * kChunkRows); ++r) {
      load_row(args, r, row);
      Cut here = cut;
      if (by_row) {
        here = row_cut(row, fan_in, of_each_row);
        ties = here.ties;
      }
      const i64 n = mark(row, fan_in, here.bits, &ties, warps);
      if (n == 0) continue;
      total += n;
      place_inputs(args, random, r, row, n);
      const i64 first = r * args.group_size, end = at_most(args.weight.rows, first + args.group_size);
      reorder(args.weight, first, end, row, args.keep_value);
      reorder(args.first, first, end, row, false);
      reorder(args.second, first, end, row, false);
      reorder(args.compensation, first, end, row, false);
    }
  }
  if (moved && threadIdx.x == 0 && total > 0) atomicAdd(moved, static_cast<Count>(total));
}

struct Plan {
  unsigned threads = 0, blocks = 0;
  i64 shared_bytes = 0, memory_each = 0;
  i64 wanted = 0;  // of the global mode
  SelectScratch select{};
  unsigned char* memory = nullptr;
};

Plan plan(Scratch& scratch, const Rewire& args) {
  Plan p;
  const i64 rows = index_rows(args), fan_in = args.weight.cols;
  p.threads = static_cast<unsigned>(at_most(kThreads, round_up(fan_in * at_most(args.group_size, 8), 32)));
  p.blocks = blocks_for(rows, kChunkRows);
  const i64 bytes = round_up(Row::bytes(fan_in, p.threads), 16);
  if (bytes <= kSharedBytes) {
    p.shared_bytes = bytes;
  } else {
    p.memory_each = bytes;
    p.blocks = blocks_for(rows, kChunkRows, 2 * hardware(args.device.index).processors);
    p.memory = scratch.take<unsigned char>(p.blocks * bytes);
  }
  if (args.mode == RewireMode::magnitude_global) {
    p.wanted = fraction_of(args.fraction, rows * fan_in);
    p.select = take_select_scratch(scratch, args);
  }
  return p;
}

bool nowhere_to_move(const Rewire& args) {
  return args.weight.rows == 0 || args.weight.cols == 0 || args.in_features == args.weight.cols;
}

}  // namespace

i64 scratch_bytes(const Rewire& args) {
  Scratch scratch;
  if (!nowhere_to_move(args)) plan(scratch, args);
  return scratch.used();
}

void rewire(const Rewire& args) {
  const Device& device = args.device;
  const DeviceGuard guard(device);
  if (args.moved)
    WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(args.moved, 0, sizeof *args.moved, static_cast<cudaStream_t>(device.stream)));
  if (nowhere_to_move(args)) return;
  Scratch scratch(device);
  const Plan p = plan(scratch, args);
  Cut given;
  const Cut* found = nullptr;
  if (args.mode == RewireMode::threshold) {
    given.bits = float_bits(static_cast<float>(args.threshold));
  } else if (args.mode == RewireMode::magnitude_global) {
    if (p.wanted == 0) return;
    select_weakest(args, p.wanted, p.select);
    found = p.select.cut;
  }
  launch(device, p.blocks, p.threads, static_cast<std::size_t>(p.shared_bytes), move_rows, args, index_rows(args),
         given, found, p.select.ties_before, fraction_of(args.fraction, args.weight.cols), p.memory, p.memory_each,
         reinterpret_cast<Count*>(args.moved));
}

}  // namespace widehead::cuda
