// sparse_products.cu -- the sparse head's products: a warp a class or an input, rows gathered 16 bytes a lane
//
// A pass of a warp takes kExamples of a row, two or more rows side by side, each by kLanes neighbouring lanes: 64 to
// 256 bytes of a row a pass, whole sectors of the L2 cache. All passes over one slice of the examples come before the next
// slice, so what they gather from is features * kExamples numbers, which stay in the cache.
#include "cuda/intrinsics.h"
#include "cuda/sparse_groups.h"
#include "cuda/sparse_products.h"

namespace widehead::cuda {
namespace {

constexpr unsigned kAll = ~0u;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLongList = 1024;  // entries of an input that the warps of a block share
// Blocks of a multiprocessor: few, so that there are registers for many loads under way.
template <class W>
constexpr int kBlocks = sizeof(W) == 8 ? 2 : 3;
constexpr i64 kManyBlocks = i64{1} << 20;

template <class W, int kExamples_>
struct Pass {
  using Real = RealOf<W>;
  static constexpr int kExamples = kExamples_;
  static constexpr int kCount = 16 / static_cast<int>(sizeof(W));  // examples of a lane
  static constexpr int kLanes = kExamples / kCount, kRows = 32 / kLanes;
  static constexpr int kLeft = kCount / kRows;  // sums of a lane when the rows have been added
  static_assert(kLeft >= 1 && kLanes <= 32);
};

template <class W>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(W);
  W at[kCount];
};

// Lanes kFrom to kDownTo apart add what they have of kN sums, and each keeps its share; returns where that begins.
template <int kN, int kFrom, int kDownTo, class Real>
__device__ inline int add_and_share(Real (&v)[kN], int lane) {
  int first = 0, n = kN;
#pragma unroll
  for (int apart = kFrom; apart >= kDownTo; apart /= 2) {
    n /= 2;
    const bool upper = (lane & apart) != 0;
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
      if (j >= n) break;
      const Real keep = upper ? v[j + n] : v[j], give = upper ? v[j] : v[j + n];
      v[j] = keep + __shfl_xor_sync(kAll, give, apart);
    }
    if (upper) first += n;
  }
  return first;
}

// sum += w * row, from 16 bytes.
template <class W, int kCount, class Real>
__device__ inline void add_row(Real (&sum)[kCount], const W* row, Real w) {
  const Vector<W> v = *reinterpret_cast<const Vector<W>*>(row);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] += w * static_cast<Real>(to_float(v.at[i]));
}

// Adds `there` rows, at most 32, whose numbers and factors the lanes have. Of 32 there is nothing to ask before a load.
template <class P, class W, class Row, class Real>
__device__ inline void add_rows(Real (&sum)[P::kCount], const W* slice, int padded, Row row, Real factor, int there) {
  const int mine = static_cast<int>(threadIdx.x) % 32 / P::kLanes;
  if (there == 32) {
#pragma unroll
    for (int k = 0; k < 32; k += P::kRows) {
      const Row from = __shfl_sync(kAll, row, k + mine);
      add_row<W>(sum, slice + static_cast<i64>(from) * padded, __shfl_sync(kAll, factor, k + mine));
    }
    return;
  }
  for (int k = 0; k < there; k += P::kRows) {
    const Row from = __shfl_sync(kAll, row, k + mine);
    const Real w = __shfl_sync(kAll, factor, k + mine);
    if (k + mine < there) add_row<W>(sum, slice + static_cast<i64>(from) * padded, w);
  }
}

// A block takes 32 classes and kExamples examples: z leaves through shared memory, in whole lines.
template <class W, int kExamples>
__global__ void __launch_bounds__(kThreads, kBlocks<W>)
    logits_kernel(SparseWeights<W> s, const W* x, i64 rows, i64 first, i64 count, RealOf<W>* z, i64 z_stride) {
  using P = Pass<W, kExamples>;
  using Real = RealOf<W>;
  __shared__ Real turned[kExamples][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const i64 fan_in = s.inputs.fan_in, across = ceil_div(count, 32), n = across * ceil_div(rows, kExamples);
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 c0 = block % across * 32, b0 = block / across * kExamples;
    const W* slice = x + b0 + lane % P::kLanes * P::kCount;
    for (int i = warp; i < 32 && c0 + i < count; i += kWarps) {
      const i64 c = first + c0 + i;
      const W* weight = s.weight + c * s.stride;
      Real sum[P::kCount] = {};
      for (i64 k0 = 0; k0 < fan_in; k0 += 32) {
        const int there = static_cast<int>(at_most(32, fan_in - k0));
        const int input = lane < there ? s.inputs.at(c, k0 + lane) : 0;
        const Real w = lane < there ? static_cast<Real>(to_float(weight[k0 + lane])) : Real{0};
        add_rows<P>(sum, slice, s.padded, input, w, there);
      }
      const int at = lane % P::kLanes * P::kCount + add_and_share<P::kCount, 16, P::kLanes>(sum, lane);
#pragma unroll
      for (int j = 0; j < P::kLeft; ++j) turned[at + j][i] = sum[j];
    }
    __syncthreads();
    if (c0 + lane < count) {
      const Real bias = bias_at<Real>(s.bias, first + c0 + lane);
      for (int b = warp; b < at_most(kExamples, rows - b0); b += kWarps)
        z[(b0 + b) * z_stride + c0 + lane] = turned[b][lane] + bias;
    }
    __syncthreads();
  }
}

// A warp a class; a lane keeps one row's sum for each of its kLanes rows, and in the end one of 32 inputs.
template <class W, int kExamples>
__global__ void __launch_bounds__(kThreads, kBlocks<W>)
    grad_weight_kernel(SparseWeights<W> s, const W* x, const W* g, i64 first, i64 count, RealOf<W>* to, i64 to_stride,
                       bool accumulate) {
  using P = Pass<W, kExamples>;
  using Real = RealOf<W>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = lane / P::kLanes, part = lane % P::kLanes * P::kCount;
  const i64 fan_in = s.inputs.fan_in;
  for (i64 c = static_cast<i64>(blockIdx.x) * kWarps + warp; c < count; c += static_cast<i64>(gridDim.x) * kWarps) {
    const W* mine = g + c * s.padded + part;
    for (i64 k0 = 0; k0 < fan_in; k0 += 32) {
      const int there = static_cast<int>(at_most(32, fan_in - k0));
      const int input = lane < there ? s.inputs.at(first + c, k0 + lane) : 0;
      Real sums[P::kLanes] = {};
      for (int b = 0; b < s.padded; b += kExamples) {
        const Vector<W> v = *reinterpret_cast<const Vector<W>*>(mine + b);
        const W* slice = x + b + part;
        // Past the fan-in the first row is read, and the sum left alone in the end.
#pragma unroll
        for (int j = 0; j < P::kLanes; ++j) {
          const int h = __shfl_sync(kAll, input, j * P::kRows + row);
          const Vector<W> u = *reinterpret_cast<const Vector<W>*>(slice + static_cast<i64>(h) * s.padded);
#pragma unroll
          for (int i = 0; i < P::kCount; ++i)
            sums[j] += static_cast<Real>(to_float(v.at[i])) * static_cast<Real>(to_float(u.at[i]));
        }
      }
      const int k = add_and_share<P::kLanes, P::kLanes / 2, 1>(sums, lane) * P::kRows + row;
      if (k >= there) continue;
      Real* at = to + c * to_stride + k0 + k;
      *at = accumulate ? *at + sums[0] : sums[0];
    }
  }
}

// What entries [begin, end) of a list give for one slice of the examples; each lane ends with kLeft sums. kRows:
// entries are rows of the slice.
template <class P, bool kRows, class W, class Real>
__device__ inline int sum_entries(const SparseWeights<W>& s, const std::uint32_t* entries, int begin, int end,
                                  const W* slice, i64 first, Real (&sum)[P::kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < P::kCount; ++i) sum[i] = 0;
  for (int e0 = begin; e0 < end; e0 += 32) {
    const int there = end - e0 < 32 ? end - e0 : 32;
    const std::uint32_t entry = lane < there ? entries[e0 + lane] : 0, cls = kRows ? entry : entry / s.inputs.fan_in;
    Real w = 1;
    if (!kRows && lane < there)
      w = static_cast<Real>(to_float(s.weight[(first + cls) * s.stride + (entry - cls * s.inputs.fan_in)]));
    add_rows<P>(sum, slice, s.padded, cls, w, there);
  }
  return lane % P::kLanes * P::kCount + add_and_share<P::kCount, 16, P::kLanes>(sum, lane);
}

// A warp an input and slice; a long list is cut into equal parts for the warps of the block, added in their order.
template <class W, int kExamples, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<W>)
    grad_hidden_kernel(SparseWeights<W> s, ListView lists, const W* g, i64 first, RealOf<W>* dx) {
  using P = Pass<W, kExamples>;
  using Real = RealOf<W>;
  __shared__ Real parts[kWarps][kExamples];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const i64 across = ceil_div(lists.features, kWarps), n = across * (s.padded / kExamples);
  for (i64 block = blockIdx.x; block < n; block += gridDim.x) {
    const i64 h0 = block % across * kWarps, b0 = block / across * kExamples, h = h0 + warp;
    const W* slice = g + b0 + lane % P::kLanes * P::kCount;
    const int begin = h < lists.features ? lists.starts[h] : 0;
    const int length = h < lists.features ? lists.starts[h + 1] - begin : 0;
    if (length > 0 && length <= kLongList) {
      Real sum[P::kCount];
      const int at = sum_entries<P, kRows>(s, lists.entries, begin, begin + length, slice, first, sum);
#pragma unroll
      for (int j = 0; j < P::kLeft; ++j) dx[h * s.padded + b0 + at + j] += sum[j];
    }
    if (!__syncthreads_or(length > kLongList)) continue;
    for (i64 other = h0; other < at_most(lists.features, h0 + kWarps); ++other) {
      const int from = lists.starts[other], all = lists.starts[other + 1] - from;
      if (all <= kLongList) continue;
      const int each = static_cast<int>(ceil_div(all, kWarps)), mine = from + warp * each;
      Real sum[P::kCount];
      const int at = sum_entries<P, kRows>(s, lists.entries, mine, static_cast<int>(at_most(from + all, mine + each)),
                                           slice, first, sum);
#pragma unroll
      for (int j = 0; j < P::kLeft; ++j) parts[warp][at + j] = sum[j];
      __syncthreads();
      for (int b = static_cast<int>(threadIdx.x); b < kExamples; b += kThreads) {
        Real total = 0;
        for (int w = 0; w < kWarps; ++w) total += parts[w][b];
        dx[other * s.padded + b0 + b] += total;
      }
      __syncthreads();
    }
  }
}

template <class W, class F>
void by_pass(int padded, F f) {
  if constexpr (sizeof(W) == 2) {
    if (padded % 64 == 0) return f(std::integral_constant<int, 64>{});
  }
  f(std::integral_constant<int, 32>{});
}

}  // namespace

template <class W>
void gather_logits(const Device& device, const SparseWeights<W>& s, const W* x, i64 rows, i64 first, i64 count,
                   RealOf<W>* z, i64 z_stride) {
  if constexpr (sizeof(W) == 2)
    if (groups_fit(device, DtypeOf<W>::value, s.inputs.group_size))
      return group_logits(device, s, x, rows, first, count, z, z_stride);
  by_pass<W>(s.padded, [&](auto examples) {
    constexpr int kExamples = decltype(examples)::value;
    launch(device, blocks_for(ceil_div(count, 32) * ceil_div(rows, kExamples), 1, kManyBlocks), kThreads, 0,
           logits_kernel<W, kExamples>, s, x, rows, first, count, z, z_stride);
  });
}

template <class W>
void gather_grad_weight(const Device& device, const SparseWeights<W>& s, const W* x, const W* g, i64 first, i64 count,
                        RealOf<W>* to, i64 to_stride, bool accumulate) {
  if constexpr (sizeof(W) == 2)
    if (groups_fit(device, DtypeOf<W>::value, s.inputs.group_size))
      return group_grad_weight(device, s, x, g, first, count, to, to_stride, accumulate);
  by_pass<W>(s.padded, [&](auto examples) {
    launch(device, blocks_for(count, kWarps, kManyBlocks), kThreads, 0,
           grad_weight_kernel<W, decltype(examples)::value>, s, x, g, first, count, to, to_stride, accumulate);
  });
}

template <class W>
void gather_grad_hidden(const Device& device, const SparseWeights<W>& s, const ListView& lists, const W* g, i64 first,
                        RealOf<W>* dx) {
  by_pass<W>(s.padded, [&](auto examples) {
    constexpr int kExamples = decltype(examples)::value;
    launch(device, blocks_for(ceil_div(lists.features, kWarps) * (s.padded / kExamples), 1, kManyBlocks), kThreads, 0,
           grad_hidden_kernel<W, kExamples, false>, s, lists, g, first, dx);
  });
}

void gather_rows_of_groups(const Device& device, const ListView& lists, const float* g, i64 padded, float* dx) {
  SparseWeights<float> s{};
  s.padded = static_cast<int>(padded);
  launch(device, blocks_for(ceil_div(lists.features, kWarps) * (padded / 32), 1, kManyBlocks), kThreads, 0,
         grad_hidden_kernel<float, 32, true>, s, lists, g, i64{0}, dx);
}

#define WIDEHEAD_PRODUCTS(W)                                                                                        \
  template void gather_logits<W>(const Device&, const SparseWeights<W>&, const W*, i64, i64, i64, RealOf<W>*, i64); \
  template void gather_grad_weight<W>(const Device&, const SparseWeights<W>&, const W*, const W*, i64, i64,         \
                                      RealOf<W>*, i64, bool);                                                       \
  template void gather_grad_hidden<W>(const Device&, const SparseWeights<W>&, const ListView&, const W*, i64,       \
                                      RealOf<W>*);
WIDEHEAD_PRODUCTS(float)
WIDEHEAD_PRODUCTS(double)
WIDEHEAD_PRODUCTS(bf16)
#undef WIDEHEAD_PRODUCTS

}  // namespace widehead::cuda
