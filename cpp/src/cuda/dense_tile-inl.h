// dense_tile-inl.h -- the kernels on a tile of logits; each type of weights instantiates them in a unit of its own
//
// Both kernels read Z once, 16 bytes a thread, and are bound by that or by the exponentials. The sums are kept by one warp an
// example and piece, so nothing but registers is needed; the gradient has a thread per column, so that the sums over
// examples that the bias wants stay in registers too.
#pragma once
#include <cmath>
#include <type_traits>

#include "cuda/convert.h"
#include "cuda/dense_tile.h"
#include "cuda/filtered_product.h"
#include "cuda/intrinsics.h"
#include "cuda/loss_math.h"

namespace widehead::cuda {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr int kVector = 4;

// exp for the type of weights: half an ulp of a 16-bit factor is far above the error of the fast one.
template <class W, class Real>
__device__ inline Real exp_for(Real x) {
  if constexpr (sizeof(W) == 2) {
    return fast_exp2(x * 1.4426950408889634f);
  } else {
    return exp_of(x);
  }
}

template <class Real>
__device__ inline void load4(const Real* from, Real (&x)[kVector]) {
  if constexpr (sizeof(Real) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const double2 a = *reinterpret_cast<const double2*>(from), b = *reinterpret_cast<const double2*>(from + 2);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
  }
}

template <class W, class Real>
__device__ inline void store4(W* to, const Real (&x)[kVector]) {
  if constexpr (sizeof(W) == 2) {
    // One number, so that it becomes one store: of two the compiler makes two as soon as something lies between.
    *reinterpret_cast<std::uint64_t*>(to) = pack2<W>(x[0], x[1]) | static_cast<std::uint64_t>(pack2<W>(x[2], x[3]))
                                                                       << 32;
  } else if constexpr (sizeof(W) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    for (int i = 0; i < kVector; ++i) to[i] = x[i];
  }
}

// Nothing is done to a logit but adding the bias, and no class counts more than another. Kernels for this alone have a
// fraction of the instructions.
template <class Real>
inline bool is_plain(const Problem<Real>& p) {
  return !(p.softcap > 0) && !p.offset && !p.class_weight && !(p.smoothing > 0);
}

template <class Real>
__device__ inline Real weight_of(const Problem<Real>& p, i64 c) {
  return p.class_weight ? static_cast<Real>(p.class_weight[c]) : Real{1};
}

// The bias of classes [c, c + 4), as far as `left` goes.
template <class Real>
__device__ inline void load_bias(const Problem<Real>& p, i64 c, i64 left, Real (&b)[kVector]) {
  const Real* at = static_cast<const Real*>(p.bias.data) + c;
  if (p.bias.data && p.bias.dtype == DtypeOf<Real>::value && left >= kVector &&
      reinterpret_cast<std::uintptr_t>(at) % 16 == 0)
    return load4(at, b);
  for (int i = 0; i < kVector; ++i) b[i] = i < left ? bias_at<Real>(p.bias, c + i) : Real{0};
}

// The logit without the offset, from product plus bias.
template <class Real>
__device__ inline Real own_logit(const Problem<Real>& p, Real sum) {
  return capped(sum, p.softcap);
}

template <class Real>
__device__ inline bool is_target(const Problem<Real>& p, const RowTargets& row, i64 c) {
  for (i64 j = row.begin; j < row.end; ++j)
    if (p.indices[j] - p.first_class == c) return true;
  return false;
}

// Offsets act on all but the example's own targets; only sampled softmax has them, over few classes.
template <class Real>
__device__ inline Real logit_of(const Problem<Real>& p, const RowTargets& row, Real sum, i64 c) {
  const Real own = own_logit(p, sum);
  if (!p.offset || is_target(p, row, c)) return own;
  return own + static_cast<Real>(p.offset[c]);
}

template <class T>
__device__ inline T warp_total(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// s takes z[i] where there is one.
template <class W, int kN, class Real>
__device__ inline void add_to(LogSum<Real>& s, const Real (&z)[kN], int there) {
  Real top = s.max;
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (i < there) top = std::fmax(z[i], top);
  Real sum = s.sum * exp_for<W>(s.max - top);
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (i < there) sum += exp_for<W>(z[i] - top);
  s = {top, sum};
}

// Of one example, over a lane's part of classes [begin, end) of the tile.
template <class Real>
struct LaneSums {
  LogSum<Real> part = empty_sum<Real>();
  Real aux = 0;
};

// kVectors times four neighbouring classes from `c` on, four of every 128, as far as `end`.
template <class W, Loss kLoss, bool kPlain, int kVectors, class Real>
__device__ inline void take_classes(LaneSums<Real>& s, const Problem<Real>& p, const RowTargets& row, const Real* z,
                                    i64 first, i64 c, i64 end) {
  constexpr int kN = kVectors * kVector;
  Real x[kN];
  const int there = static_cast<int>(at_most(end - c, kVector));  // of the last four
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Real products[kVector], bias[kVector];
    load4(z + c + v * 32 * kVector, products);
    load_bias(p, first + c + v * 32 * kVector, kVectors > 1 ? kVector : there, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[v * kVector + i] = products[i] + bias[i];
  }
  if constexpr (!kPlain || kLoss != Loss::softmax) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (kVectors == 1 && i >= there) continue;
      const i64 cls = first + c + i / kVector * 32 * kVector + i % kVector;
      const Real weight = kPlain ? Real{1} : weight_of(p, cls);
      if constexpr (!kPlain) x[i] = logit_of(p, row, x[i], cls);
      if (kLoss != Loss::softmax) s.aux += class_loss<kLoss>(x[i]) * weight;
      if (kLoss == Loss::softmax && p.smoothing > 0) s.aux += x[i] * weight;
    }
  }
  if (kLoss == Loss::softmax) add_to<W>(s.part, x, kVectors > 1 ? kN : there);
}

template <class W, Loss kLoss, bool kPlain, class Real>
__global__ void __launch_bounds__(256) accumulate_kernel(Problem<Real> p, TilePlace t, Pieces pieces,
                                                         const RowTargets* rows, const Real* z, RowSums<Real>* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const i64 warps = static_cast<i64>(gridDim.x) * (blockDim.x / 32);
  for (i64 item = static_cast<i64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; item < t.rows * pieces.slots;
       item += warps) {
    const i64 r = item / pieces.slots, slot = item % pieces.slots, b = t.row + r;
    const i64 begin = slot * pieces.piece, end = at_most(begin + pieces.piece, t.count);
    if (begin >= end) continue;
    const RowTargets row = rows[b];
    const Real* zr = z + r * t.stride;
    LaneSums<Real> mine;
    i64 c = begin + lane * kVector;
    if constexpr (kPlain && sizeof(Real) == 4)
      for (; c + 32 * kVector + kVector <= end; c += 2 * 32 * kVector)
        take_classes<W, kLoss, kPlain, 2>(mine, p, row, zr, t.first, c, end);
    for (; c < end; c += 32 * kVector) take_classes<W, kLoss, kPlain, 1>(mine, p, row, zr, t.first, c, end);
    LogSum<Real> part = mine.part;
    double output = 0, adjust = 0;
    for (i64 j = row.begin + lane; j < row.end; j += 32) {
      const i64 cls = p.indices[j] - p.first_class, c = cls - t.first;
      if (c < begin || c >= end) continue;
      const auto logit = static_cast<double>(own_logit(p, zr[c] + bias_at<Real>(p.bias, cls)));
      const double y = p.values ? static_cast<double>(p.values[j]) : 1.0;
      output += y * logit;
      adjust += target_loss<kLoss>(logit, y, static_cast<double>(weight_of(p, cls)));
    }
    if (kLoss == Loss::softmax)
      for (int step = 16; step > 0; step /= 2) {
        const LogSum<Real> other{__shfl_xor_sync(kAllLanes, part.max, step),
                                 __shfl_xor_sync(kAllLanes, part.sum, step)};
        part = merged(part, other);
      }
    const Real aux = warp_total(mine.aux);
    output = warp_total(output);
    adjust = warp_total(adjust);
    if (lane != 0) continue;
    RowSums<Real> s = sums[b * pieces.slots + slot];
    if (kLoss == Loss::softmax) {
      const Real top = larger(s.max, part.max), scale = exp_of(s.max - top);
      s.max = top;
      s.sum *= scale;
      s.lost *= scale;
      kahan_add(s.sum, s.lost, part.sum * exp_of(part.max - top));
    }
    kahan_add(s.aux, s.aux_lost, aux);
    s.output += output;
    s.adjust += adjust;
    sums[b * pieces.slots + slot] = s;
  }
}

constexpr int kPatchThreads = kPatchColumns / kVector;
constexpr int kMaskWords = kPatchColumns / 32;
static_assert(kFlagRows == kPatchRows && kFlagColumns == 32 * kVector, "a flag is a warp's part of a patch");

// Bit c of mask[r]: class c of the patch is a target of its example r.
template <class Real>
__device__ inline void mark_targets(unsigned (*mask)[kMaskWords], const Problem<Real>& p, const RowTargets* rows,
                                    i64 patch_rows, i64 first) {
  for (int i = static_cast<int>(threadIdx.x); i < kPatchRows * kMaskWords; i += kPatchThreads)
    mask[i / kMaskWords][i % kMaskWords] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (i64 r = threadIdx.x / 32; r < patch_rows; r += kPatchThreads / 32)
    for (i64 j = rows[r].begin + lane; j < rows[r].end; j += 32) {
      const i64 c = p.indices[j] - p.first_class - first;
      if (c >= 0 && c < kPatchColumns) atomicOr(&mask[r][c / 32], 1u << (c % 32));
    }
  __syncthreads();
}

template <class Real>
__device__ inline Real value_of(const Problem<Real>& p, const RowTargets& row, i64 c) {
  for (i64 j = row.begin; j < row.end; ++j)
    if (p.indices[j] - p.first_class == c) return p.values ? static_cast<Real>(p.values[j]) : Real{1};
  return 0;
}

// dL/dz of class c, from product plus bias.
template <class W, Loss kLoss, bool kPlain, bool kTarget, class Real>
__device__ inline Real gradient_at(const Problem<Real>& p, const RowTargets* row, const RowGradient<Real>& in, Real sum,
                                   i64 c) {
  Real own = sum, z = sum, w = 1;
  if constexpr (!kPlain) {
    own = z = own_logit(p, sum);
    if (p.offset && !kTarget) z += static_cast<Real>(p.offset[c]);
    if (kLoss != Loss::softmax || kTarget || p.smoothing > 0) w = weight_of(p, c);
  }
  Real g;
  if constexpr (kLoss == Loss::bce && sizeof(W) == 2) {
    g = fast_sigmoid(z) * in.scale * w;
  } else {
    g = class_gradient<kLoss>(z, kLoss == Loss::softmax ? exp_for<W>(z - in.lse) : Real{0}, in.scale, in.even, w);
  }
  if (kTarget) g += target_gradient<kLoss>(z, value_of(p, *row, c), w, in.loss, in.output, p.smoothing);
  if constexpr (kPlain) return g;
  return kLoss == Loss::softmax && p.softcap > 0 ? g * cap_slope(own, p.softcap) : g;
}

// One block a patch of kPatchRows examples by kPatchColumns classes, four neighbouring classes a thread.
template <class W, Loss kLoss, bool kPlain, class Real>
__global__ void __launch_bounds__(kPatchThreads)
    gradient_kernel(Problem<Real> p, TilePlace t, GradientTask<W, Real> task) {
  __shared__ unsigned mask[kPatchRows][kMaskWords];
  const i64 across = ceil_div(t.count, kPatchColumns), down = ceil_div(t.rows, kPatchRows);
  const bool refused = *task.refused != 0, filter = task.filter_eps > 0;
  const Real bound = static_cast<Real>(task.filter_eps) * static_cast<Real>(*task.largest);
  for (i64 patch = blockIdx.x; patch < across * down; patch += gridDim.x) {
    const i64 r0 = patch / across * kPatchRows, c0 = patch % across * kPatchColumns;
    const i64 mine = c0 + threadIdx.x * kVector, left = t.count - mine;
    const int patch_rows = static_cast<int>(at_most(kPatchRows, t.rows - r0));
    const int here = static_cast<int>(at_least(0, at_most(kVector, left)));  // of this thread's four
    const RowTargets* rows = task.rows + t.row + r0;
    __syncthreads();  // the last patch's mask is still being read
    mark_targets(mask, p, rows, patch_rows, t.first + c0);
    Real sums[kVector] = {}, bias[kVector] = {};
    if (here > 0) load_bias(p, t.first + mine, left, bias);
    bool keep = !filter;
    const Real* z = task.z + r0 * t.stride + mine;
    W* g = task.g + r0 * t.stride + mine;
    const unsigned *word = &mask[0][threadIdx.x / 8], shift = threadIdx.x % 8 * kVector;
    const RowGradient<Real>* at = task.gradients + t.row + r0;
    const RowGradient<Real>* const end = here > 0 ? at + patch_rows : at;
    for (; at < end; ++at, z += t.stride, g += t.stride, word += kMaskWords) {
      const RowGradient<Real> in = *at;
      const unsigned targets = *word >> shift & 15u;
      Real products[kVector], x[kVector] = {};
      load4(z, products);
      if (!refused) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (kPlain || i < here)
            x[i] = gradient_at<W, kLoss, kPlain, false>(p, rows, in, products[i] + bias[i], t.first + mine + i);
        if (targets != 0) {
          const RowTargets* row = rows + (patch_rows - (end - at));
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            if (targets >> i & 1u)
              x[i] = gradient_at<W, kLoss, kPlain, true>(p, row, in, products[i] + bias[i], t.first + mine + i);
        }
      }
      if (here < kVector) {
#pragma unroll
        for (int i = 1; i < kVector; ++i)
          if (i >= here) x[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += x[i];
      if (filter) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) keep = keep || (i < here && !((x[i] < 0 ? -x[i] : x[i]) < bound));
      }
      store4(g, x);
    }
    if (filter) {
      const bool kept = __any_sync(kAllLanes, keep) != 0;
      if (!kept) {
        const Real zeros[kVector] = {};
        for (int r = 0; r < patch_rows && here > 0; ++r) store4(task.g + (r0 + r) * t.stride + mine, zeros);
        for (Real& s : sums) s = 0;
      }
      if (threadIdx.x % 32 == 0 && here > 0) {
        if (task.flags) task.flags[r0 / kFlagRows * task.flag_stride + mine / kFlagColumns] = kept;
        if (!kept && task.filtered) atomicAdd(reinterpret_cast<unsigned long long*>(task.filtered), 1ull);
      }
    }
    if (task.column_sums && here > 0)
      for (int i = 0; i < kVector; ++i) task.column_sums[r0 / kPatchRows * t.stride + mine + i] = sums[i];
  }
}

constexpr i64 kManyBlocks = i64{1} << 20;

// Calls f with the loss, and whether the problem is plain, as constants.
template <class Real, class F>
void with_kind(Loss loss, const Problem<Real>& problem, F f) {
  const auto with_loss = [&](auto plain) {
    switch (loss) {
      case Loss::bce: return f(std::integral_constant<Loss, Loss::bce>{}, plain);
      case Loss::squared_hinge: return f(std::integral_constant<Loss, Loss::squared_hinge>{}, plain);
      default: return f(std::integral_constant<Loss, Loss::softmax>{}, plain);
    }
  };
  if (is_plain(problem)) return with_loss(std::true_type{});
  with_loss(std::false_type{});
}

}  // namespace

template <class W, class Real>
void accumulate_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                     const Pieces& pieces, const RowTargets* rows, const Real* z, RowSums<Real>* sums) {
  with_kind(loss, problem, [&](auto kind, auto plain) {
    launch(device, blocks_for(place.rows * pieces.slots, 8, kManyBlocks), 256, 0,
           accumulate_kernel<W, decltype(kind)::value, decltype(plain)::value, Real>, problem, place, pieces, rows, z,
           sums);
  });
}

template <class W, class Real>
void gradient_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                   const GradientTask<W, Real>& task) {
  const i64 patches = ceil_div(place.rows, kPatchRows) * ceil_div(place.count, kPatchColumns);
  with_kind(loss, problem, [&](auto kind, auto plain) {
    launch(device, blocks_for(patches, 1, kManyBlocks), kPatchThreads, 0,
           gradient_kernel<W, decltype(kind)::value, decltype(plain)::value, Real>, problem, place, task);
  });
}

}  // namespace widehead::cuda
