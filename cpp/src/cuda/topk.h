// topk.h -- parts of the selection: entries and their order, the sorting network, online log-sum-exp
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/intrinsics.h"
#include "cuda/launch.h"
#include "widehead/dense.h"

namespace widehead::cuda {

constexpr std::uint32_t kNoClass = ~std::uint32_t{0};

// Where the selection gets logits from, without bias, soft cap and offset.
class LogitSource {
 public:
  virtual ~LogitSource() = default;
  virtual i64 most_rows() const = 0;                                       // of the batch at a time
  virtual void take(i64 rows, Scratch& scratch) = 0;                       // memory for so many examples at a time
  virtual void begin(i64 first, i64 rows) = 0;                             // tiles are of these examples from now on
  virtual void tile(i64 first, i64 count, void* z, i64 stride) const = 0;  // of these classes
};

// The best classes by the logits of `source`; of args.layer only what both heads have is looked at. With a scratch that
// only counts, it only takes memory.
void select_topk(const DenseTopK& args, LogitSource& source, Scratch& scratch);

template <class Real>
struct alignas(2 * sizeof(Real)) Entry {
  Real score;
  std::uint32_t cls;
};

template <class Real>
__device__ inline Entry<Real> no_entry() {
  return {-static_cast<Real>(INFINITY), kNoClass};
}

// The order of the results; scores are never NaN, and no class comes twice.
template <class Real>
__device__ inline bool better(const Entry<Real>& a, const Entry<Real>& b) {
  return a.score > b.score || (a.score == b.score && a.cls < b.cls);
}

// Each step of the network needs the one before it: of the whole block, or, where partners are near, of the warp alone.
__device__ inline void sync_steps(int apart, int next_apart) {
  if (apart > 32 || next_apart > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// s [2 half]: the first half sorted, best first; the second in any order. Leaves the best half of all sorted in the first
// half. `half` is a power of two, at least 128. By all threads of a block, whose writes to s must be visible.
template <class Real>
__device__ inline void keep_best_half(Entry<Real>* s, int half) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto order = [&](int i, int j, bool best_first) {
    const Entry<Real> a = s[i], b = s[j];
    if (better(b, a) == best_first) {
      s[i] = b;
      s[j] = a;
    }
  };
  // Bitonic: the second half is sorted, best last; then both halves are one bitonic sequence.
  for (int size = 2; size <= half; size *= 2) {
    for (int apart = size / 2; apart > 0; apart /= 2) {
      for (int p = thread; p < half / 2; p += threads) {
        const int i = half + 2 * p - (p & (apart - 1));
        order(i, i + apart, (i & size) == 0);
      }
      sync_steps(apart, apart > 1 ? apart / 2 : size == half ? half : size);
    }
  }
  for (int i = thread; i < half; i += threads)
    if (better(s[half + i], s[i])) s[i] = s[half + i];
  __syncthreads();
  for (int apart = half / 2; apart > 0; apart /= 2) {
    for (int p = thread; p < half / 2; p += threads) {
      const int i = 2 * p - (p & (apart - 1));
      order(i, i + apart, true);
    }
    sync_steps(apart, apart > 1 ? apart / 2 : half);
  }
}

// Of a sum of many: the fast one's error is that of the sum. Not exp_of of loss_math.h, which is exact.
__device__ inline float exp_term(float x) { return fast_exp2(x * 1.44269504f); }
__device__ inline double exp_term(double x) { return std::exp(x); }

// exp(top) * sum, of numbers that come bit by bit. A NaN among them stays in the sum.
template <class Real>
struct OnlineSum {
  Real top = -static_cast<Real>(INFINITY), sum = 0;

  // Raises top to at least `other`; what terms are then divided by is exp of the result.
  __device__ inline Real raise(Real other) {
    const Real higher = std::fmax(top, other);
    const Real base = higher == -static_cast<Real>(INFINITY) ? Real{0} : higher;
    sum *= exp_term(top - base);
    top = higher;
    return base;
  }
  __device__ inline void add(Real other_top, Real other_sum) {
    const Real base = raise(other_top);
    sum += other_sum * exp_term(other_top - base);
  }
  // Of all lanes of the warp, in a fixed order.
  __device__ inline void add_lanes() {
    for (int apart = 16; apart > 0; apart /= 2) {
      const Real other_top = __shfl_xor_sync(~0u, top, apart), other_sum = __shfl_xor_sync(~0u, sum, apart);
      add(other_top, other_sum);
    }
  }
};

}  // namespace widehead::cuda
