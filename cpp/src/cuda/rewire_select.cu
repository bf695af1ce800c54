// rewire_select.cu -- the exact strength that the weakest connections end at, by two passes of 16 bits: nothing is sorted
#include "cuda/rewire_select.h"

namespace widehead::cuda {
namespace {

using Count = unsigned long long;

constexpr int kThreads = 256;
constexpr int kScanThreads = 512;  // of the one block that adds up
constexpr int kBins = 1 << 16;

// Counts the upper 16 bits of all strengths, or, where those are the cut's, the lower.
template <bool kLow>
__global__ void __launch_bounds__(kThreads) count_bins(Rewire args, i64 rows, const Cut* cut, Count* counts) {
  if (is_refused(args)) return;
  const i64 fan_in = args.weight.cols, n = rows * fan_in;
  for (i64 base = static_cast<i64>(blockIdx.x) * kThreads; base < n; base += static_cast<i64>(gridDim.x) * kThreads) {
    const i64 i = base + threadIdx.x;
    int bin = -1;
    if (i < n) {
      const std::uint32_t bits = strength(args, i / fan_in, i % fan_in);
      if (!kLow) {
        bin = static_cast<int>(bits >> 16);
      } else if (bits >> 16 == cut->bits >> 16) {
        bin = static_cast<int>(bits & 0xFFFFu);
      }
    }
    // A layer of equal numbers would have all threads wait for one counter.
    const int common = __shfl_sync(~0u, bin, 0);
    if (__all_sync(~0u, bin == common)) {
      if (common >= 0 && threadIdx.x % 32 == 0) atomicAdd(counts + common, Count{32});
    } else if (bin >= 0) {
      atomicAdd(counts + bin, Count{1});
    }
  }
}

// Sum of x over this thread and those before it; `sums` takes all of them. By one block of kScanThreads.
template <class T>
__device__ inline T scan_block(T x, T* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the last scan's sums have been read
  sums[thread] = x;
  __syncthreads();
  for (int apart = 1; apart < kScanThreads; apart *= 2) {
    const T before = thread >= apart ? sums[thread - apart] : T{0};
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  return sums[thread];
}

// The bin that the `wanted`-th strength falls into, and its rank there.
template <bool kLow>
__global__ void __launch_bounds__(kScanThreads) find_bin(const Count* counts, i64 wanted, Cut* cut) {
  __shared__ Count sums[kScanThreads];
  constexpr int kEach = kBins / kScanThreads;
  const Count* const mine = counts + static_cast<i64>(threadIdx.x) * kEach;
  const Count rank = static_cast<Count>(kLow ? cut->ties : wanted);
  const std::uint32_t high = kLow ? cut->bits : 0;
  Count sum = 0;
  for (int i = 0; i < kEach; ++i) sum += mine[i];
  const Count end = scan_block(sum, sums), begin = end - sum;
  if (rank <= begin || rank > end) return;
  Count left = rank - begin;
  int i = 0;
  while (left > mine[i]) left -= mine[i++];
  const auto bin = static_cast<std::uint32_t>(threadIdx.x) * kEach + static_cast<std::uint32_t>(i);
  cut->bits = kLow ? high | bin : bin << 16;
  cut->ties = static_cast<i64>(left);
}

// A warp a chunk of rows.
__global__ void __launch_bounds__(kThreads) count_ties(Rewire args, i64 rows, const Cut* cut, i64* ties) {
  if (is_refused(args)) return;
  const i64 fan_in = args.weight.cols, chunks = ceil_div(rows, kChunkRows), lane = threadIdx.x % 32;
  for (i64 chunk = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) / 32; chunk < chunks;
       chunk += static_cast<i64>(gridDim.x) * (kThreads / 32)) {
    const i64 end = at_most(rows, (chunk + 1) * kChunkRows) * fan_in;
    i64 n = 0;
    for (i64 i = chunk * kChunkRows * fan_in + lane; i < end; i += 32)
      n += strength(args, i / fan_in, i % fan_in) == cut->bits;
    for (int apart = 16; apart > 0; apart /= 2) n += __shfl_xor_sync(~0u, n, apart);
    if (lane == 0) ties[chunk] = n;
  }
}

// ties [n] becomes the sums before each.
__global__ void __launch_bounds__(kScanThreads) sum_before(i64* ties, i64 n) {
  __shared__ i64 sums[kScanThreads];
  i64 before = 0;
  for (i64 base = 0; base < n; base += kScanThreads) {
    const i64 i = base + threadIdx.x;
    const i64 own = i < n ? ties[i] : 0;
    const i64 end = scan_block(own, sums);
    if (i < n) ties[i] = before + end - own;
    before += sums[kScanThreads - 1];
  }
}

template <bool kLow>
void narrow(const Rewire& args, i64 wanted, const SelectScratch& s) {
  const Device& device = args.device;
  const i64 rows = index_rows(args);
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(s.counts, 0, kBins * sizeof *s.counts, static_cast<cudaStream_t>(device.stream)));
  launch(device, blocks_for(rows * args.weight.cols, kThreads), kThreads, 0, count_bins<kLow>, args, rows, s.cut,
         s.counts);
  launch(device, 1, kScanThreads, 0, find_bin<kLow>, s.counts, wanted, s.cut);
}

}  // namespace

SelectScratch take_select_scratch(Scratch& scratch, const Rewire& args) {
  SelectScratch s{};
  s.counts = scratch.take<Count>(kBins);
  s.cut = scratch.take<Cut>(1);
  s.ties_before = scratch.take<i64>(ceil_div(index_rows(args), kChunkRows));
  return s;
}

void select_weakest(const Rewire& args, i64 wanted, const SelectScratch& s) {
  const i64 rows = index_rows(args), chunks = ceil_div(rows, kChunkRows);
  narrow<false>(args, wanted, s);
  narrow<true>(args, wanted, s);
  launch(args.device, blocks_for(chunks, kThreads / 32), kThreads, 0, count_ties, args, rows, s.cut, s.ties_before);
  launch(args.device, 1, kScanThreads, 0, sum_before, s.ties_before, chunks);
}

}  // namespace widehead::cuda
