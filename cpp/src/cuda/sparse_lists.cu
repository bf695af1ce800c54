// sparse_lists.cu -- the transposed index of a tile: entries counted, placed and sorted input by input
//
// Atomics give each entry a place in its input's list, in any order; then the lists, which are short, are sorted. What
// is summed along them comes in one order only, so results are the same bits every time.
#include "cuda/intrinsics.h"
#include "cuda/sparse_lists.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr i64 kMostParts = 1024;  // of the prefix sum
constexpr int kWarpList = 256;    // entries that a warp sorts by itself
constexpr int kBlockList = 8192;  // that a block sorts in shared memory; longer lists are sorted where they lie

__device__ inline i64 global_thread() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 threads_in_grid() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// Leaves in counts[h], zero before, how many entries input h has, and in ranks how many of them came before each.
__global__ void __launch_bounds__(kThreads)
    count_entries(SparseInputs in, i64 first, std::uint32_t n, int* counts, int* ranks) {
  for (i64 i = global_thread(); i < n; i += threads_in_grid()) {
    const auto e = static_cast<std::uint32_t>(i);
    ranks[e] = atomicAdd(counts + in.at(first + e / in.fan_in, e % in.fan_in), 1);
  }
}

__device__ inline int warp_sum(int x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// The sum of x over the block, for all its threads. `warps` may be used again after the next barrier.
__device__ inline int block_sum(int x, int* warps) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += warps[w];
  return sum;
}

// A block a part of the counts.
__global__ void __launch_bounds__(kThreads) sum_counts(const int* counts, i64 n, i64 part, int* parts) {
  __shared__ int warps[kWarps];
  const i64 begin = part * blockIdx.x, end = at_most(n, begin + part);
  int sum = 0;
  for (i64 i = begin + threadIdx.x; i < end; i += kThreads) sum += counts[i];
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// starts[h] = the sum of counts[0 .. h), h up to n. Counts go back to zero on the way.
__global__ void __launch_bounds__(kThreads) scan_counts(int* counts, i64 n, i64 part, const int* parts, int* starts) {
  __shared__ int warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int before = 0;
  for (unsigned i = threadIdx.x; i < blockIdx.x; i += kThreads) before += parts[i];
  before = block_sum(before, warps);
  const i64 begin = part * blockIdx.x, end = at_most(n, begin + part);
  for (i64 first = begin; first < end; first += kThreads) {
    const i64 i = first + thread;
    const int mine = i < end ? counts[i] : 0;
    int upto = mine;
    for (int apart = 1; apart < 32; apart *= 2) {
      const int other = __shfl_up_sync(~0u, upto, apart);
      if (lane >= apart) upto += other;
    }
    __syncthreads();  // `warps` is still being read
    if (lane == 31) warps[warp] = upto;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) upto += warps[w];
      all += warps[w];
    }
    if (i < end) {
      starts[i] = before + upto - mine;
      counts[i] = 0;
    }
    before += all;
  }
  if (end == n && begin < n && thread == 0) starts[n] = before;
}

__global__ void __launch_bounds__(kThreads) place_entries(SparseInputs in, i64 first, std::uint32_t n,
                                                          const int* starts, const int* ranks, std::uint32_t* entries) {
  for (i64 i = global_thread(); i < n; i += threads_in_grid()) {
    const auto e = static_cast<std::uint32_t>(i);
    entries[starts[in.at(first + e / in.fan_in, e % in.fan_in)] + ranks[e]] = e;
  }
}

// Sorts s [n] in place by a bitonic network for any n: places from n on hold infinities that never move, since every
// comparison brings the smaller number forward. `threads` of them, the mine-th calls; `wait` makes all wait.
template <class Wait>
__device__ inline void sort_entries(std::uint32_t* s, unsigned n, unsigned mine, unsigned threads, Wait wait) {
  const auto order = [&](unsigned a, unsigned b) {
    if (b >= n) return;
    const std::uint32_t x = s[a], y = s[b];
    if (y < x) {
      s[a] = y;
      s[b] = x;
    }
  };
  for (unsigned half = 1; half < n; half *= 2) {
    // Mirrored pairs of runs that ascend both, then halves of halves.
    for (unsigned p = mine, base; (base = (p & ~(half - 1)) * 2) < n; p += threads)
      order(base + (p & (half - 1)), base + 2 * half - 1 - (p & (half - 1)));
    wait();
    for (unsigned apart = half / 2; apart > 0; apart /= 2) {
      for (unsigned p = mine, base; (base = (p & ~(apart - 1)) * 2) < n; p += threads)
        order(base + (p & (apart - 1)), base + (p & (apart - 1)) + apart);
      wait();
    }
  }
}

// A warp an input; lists too long for it are taken by the block, one after the other.
__global__ void __launch_bounds__(kThreads) sort_lists(const int* starts, i64 features, std::uint32_t* entries) {
  __shared__ std::uint32_t room[kBlockList];
  static_assert(kWarps * kWarpList <= kBlockList);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (i64 h0 = static_cast<i64>(blockIdx.x) * kWarps; h0 < features; h0 += static_cast<i64>(gridDim.x) * kWarps) {
    const i64 h = h0 + warp;
    const int begin = h < features ? starts[h] : 0, n = h < features ? starts[h + 1] - begin : 0;
    if (n > 1 && n <= kWarpList) {
      std::uint32_t* mine = room + warp * kWarpList;
      for (int i = lane; i < n; i += 32) mine[i] = entries[begin + i];
      __syncwarp();
      sort_entries(mine, static_cast<unsigned>(n), threadIdx.x % 32, 32, [] { __syncwarp(); });
      for (int i = lane; i < n; i += 32) entries[begin + i] = mine[i];
    }
    if (!__syncthreads_or(n > kWarpList)) continue;
    for (i64 other = h0; other < at_most(features, h0 + kWarps); ++other) {
      const int from = starts[other], length = starts[other + 1] - from;
      if (length <= kWarpList) continue;
      std::uint32_t* list = entries + from;
      const bool fits = length <= kBlockList;
      if (fits)
        for (int i = thread; i < length; i += kThreads) room[i] = list[i];
      __syncthreads();
      sort_entries(fits ? room : list, static_cast<unsigned>(length), threadIdx.x, kThreads, [] { __syncthreads(); });
      if (fits)
        for (int i = thread; i < length; i += kThreads) list[i] = room[i];
      __syncthreads();
    }
  }
}

}  // namespace

SparseLists::SparseLists(i64 features, i64 tile, i64 fan_in, Scratch& scratch)
    : features_(features),
      counts_(scratch.take<int>(features)),
      starts_(scratch.take<int>(features + 1)),
      parts_(scratch.take<int>(kMostParts)),
      ranks_(scratch.take<int>(tile * fan_in)),
      entries_(scratch.take<std::uint32_t>(tile * fan_in)) {}

void SparseLists::begin(const Device& device) const {
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(counts_, 0, static_cast<std::size_t>(features_) * sizeof(int),
                                      static_cast<cudaStream_t>(device.stream)));
}

void SparseLists::build(const Device& device, const SparseInputs& inputs, i64 first, i64 count) const {
  const i64 n = count * inputs.fan_in;
  const i64 part = at_least(4 * kThreads, round_up(ceil_div(features_, kMostParts), kThreads));
  const auto parts = static_cast<unsigned>(ceil_div(features_, part));
  const unsigned blocks = blocks_for(n, kThreads);
  launch(device, blocks, kThreads, 0, count_entries, inputs, first, n, counts_, ranks_);
  launch(device, parts, kThreads, 0, sum_counts, counts_, features_, part, parts_);
  launch(device, parts, kThreads, 0, scan_counts, counts_, features_, part, parts_, starts_);
  launch(device, blocks, kThreads, 0, place_entries, inputs, first, n, starts_, ranks_, entries_);
  launch(device, blocks_for(features_, kWarps), kThreads, 0, sort_lists, starts_, features_, entries_);
}

}  // namespace widehead::cuda
