// dense_tile-inl.h -- the kernels on a tile of logits; each type of weights instantiates them in a unit of its own
//
// Both kernels read Z once, 16 bytes a thread, and are bound by that or by the exponentials. The sums are kept by one warp an
// example and piece, so nothing but registers is needed; the gradient has a thread per column, so that the sums over
// examples that the bias wants stay in registers too.
#pragma once
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
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<W>(x[0], x[1]), pack2<W>(x[2], x[3]));
  } else if constexpr (sizeof(W) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    for (int i = 0; i < kVector; ++i) to[i] = x[i];
  }
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

// The logit without the offset.
template <class Real>
__device__ inline Real own_logit(const Problem<Real>& p, Real product, Real bias) {
  return capped(product + bias, p.softcap);
}

template <class Real>
__device__ inline bool is_target(const Problem<Real>& p, const RowTargets& row, i64 c) {
  for (i64 j = row.begin; j < row.end; ++j)
    if (p.indices[j] == c) return true;
  return false;
}

// Offsets act on all but the example's own targets; only sampled softmax has them, over few classes.
template <class Real>
__device__ inline Real logit_of(const Problem<Real>& p, const RowTargets& row, Real product, Real bias, i64 c) {
  const Real own = own_logit(p, product, bias);
  if (!p.offset || is_target(p, row, c)) return own;
  return own + static_cast<Real>(p.offset[c]);
}

template <class T>
__device__ inline T warp_total(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class W, class Real>
__device__ inline void add_to(LogSum<Real>& s, const Real (&z)[kVector], const bool (&there)[kVector]) {
  Real top = s.max;
  for (int i = 0; i < kVector; ++i)
    if (there[i]) top = larger(z[i], top);
  Real sum = s.sum * exp_for<W>(s.max - top);
  for (int i = 0; i < kVector; ++i)
    if (there[i]) sum += exp_for<W>(z[i] - top);
  s = {top, sum};
}

template <class W, Loss kLoss, class Real>
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
    LogSum<Real> part = empty_sum<Real>();
    Real aux = 0;
    for (i64 c = begin + lane * kVector; c < end; c += 32 * kVector) {
      Real x[kVector], bias[kVector];
      bool there[kVector];
      load4(zr + c, x);
      load_bias(p, t.first + c, end - c, bias);
      for (int i = 0; i < kVector; ++i) {
        there[i] = c + i < end;
        if (!there[i]) continue;
        const i64 cls = t.first + c + i;
        x[i] = logit_of(p, row, x[i], bias[i], cls);
        if (kLoss != Loss::softmax) aux += class_loss<kLoss>(x[i]) * weight_of(p, cls);
        if (kLoss == Loss::softmax && p.smoothing > 0) aux += x[i] * weight_of(p, cls);
      }
      if (kLoss == Loss::softmax) add_to<W>(part, x, there);
    }
    double output = 0, adjust = 0;
    for (i64 j = row.begin + lane; j < row.end; j += 32) {
      const i64 c = p.indices[j] - t.first;
      if (c < begin || c >= end) continue;
      const auto logit = static_cast<double>(own_logit(p, zr[c], bias_at<Real>(p.bias, p.indices[j])));
      const double y = p.values ? static_cast<double>(p.values[j]) : 1.0;
      output += y * logit;
      adjust += target_loss<kLoss>(logit, y, static_cast<double>(weight_of(p, p.indices[j])));
    }
    if (kLoss == Loss::softmax)
      for (int step = 16; step > 0; step /= 2) {
        const LogSum<Real> other{__shfl_xor_sync(kAllLanes, part.max, step),
                                 __shfl_xor_sync(kAllLanes, part.sum, step)};
        part = merged(part, other);
      }
    aux = warp_total(aux);
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
                                    i64 patch_rows, i64 first_class) {
  for (int i = static_cast<int>(threadIdx.x); i < kPatchRows * kMaskWords; i += kPatchThreads)
    mask[i / kMaskWords][i % kMaskWords] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (i64 r = threadIdx.x / 32; r < patch_rows; r += kPatchThreads / 32)
    for (i64 j = rows[r].begin + lane; j < rows[r].end; j += 32) {
      const i64 c = p.indices[j] - first_class;
      if (c >= 0 && c < kPatchColumns) atomicOr(&mask[r][c / 32], 1u << (c % 32));
    }
  __syncthreads();
}

template <class Real>
__device__ inline Real value_of(const Problem<Real>& p, const RowTargets& row, i64 c) {
  for (i64 j = row.begin; j < row.end; ++j)
    if (p.indices[j] == c) return p.values ? static_cast<Real>(p.values[j]) : Real{1};
  return 0;
}

template <class W, Loss kLoss, class Real>
__device__ inline Real gradient_at(const Problem<Real>& p, const RowTargets* row, const RowGradient<Real>& in,
                                   Real product, Real bias, i64 c, bool target) {
  const Real own = own_logit(p, product, bias);
  const Real z = p.offset && !target ? own + static_cast<Real>(p.offset[c]) : own;
  const Real w = p.class_weight && (kLoss != Loss::softmax || target || p.smoothing > 0) ? weight_of(p, c) : Real{1};
  const Real prob = kLoss == Loss::softmax ? exp_for<W>(z - in.lse) : Real{0};
  Real g = class_gradient<kLoss>(z, prob, in.scale, in.even, w);
  if (target) g += target_gradient<kLoss>(z, value_of(p, *row, c), w, in.loss, in.output, p.smoothing);
  return kLoss == Loss::softmax && p.softcap > 0 ? g * cap_slope(own, p.softcap) : g;
}

// One block a patch of kPatchRows examples by kPatchColumns classes, four neighbouring classes a thread.
template <class W, Loss kLoss, class Real>
__global__ void __launch_bounds__(kPatchThreads)
    gradient_kernel(Problem<Real> p, TilePlace t, GradientTask<W, Real> task) {
  __shared__ unsigned mask[kPatchRows][kMaskWords];
  const i64 across = ceil_div(t.count, kPatchColumns), down = ceil_div(t.rows, kPatchRows);
  const bool refused = *task.refused != 0;
  const Real bound = static_cast<Real>(task.filter_eps) * static_cast<Real>(*task.largest);
  for (i64 patch = blockIdx.x; patch < across * down; patch += gridDim.x) {
    const i64 r0 = patch / across * kPatchRows, c0 = patch % across * kPatchColumns;
    const i64 patch_rows = at_most(kPatchRows, t.rows - r0), mine = c0 + threadIdx.x * kVector;
    const i64 left = t.count - mine;
    const RowTargets* rows = task.rows + t.row + r0;
    __syncthreads();  // the last patch's mask is still being read
    mark_targets(mask, p, rows, patch_rows, t.first + c0);
    Real sums[kVector] = {}, bias[kVector] = {};
    if (left > 0) load_bias(p, t.first + mine, left, bias);
    bool keep = !(task.filter_eps > 0);
    for (i64 r = 0; r < patch_rows && left > 0; ++r) {
      const RowGradient<Real> in = task.gradients[t.row + r0 + r];
      const unsigned targets = mask[r][threadIdx.x / 8] >> (threadIdx.x % 8 * kVector);
      Real x[kVector];
      load4(task.z + (r0 + r) * t.stride + mine, x);
      for (int i = 0; i < kVector; ++i) {
        if (i >= left) continue;
        const bool target = ((targets >> i) & 1u) != 0;
        x[i] = refused ? Real{0} : gradient_at<W, kLoss>(p, rows + r, in, x[i], bias[i], t.first + mine + i, target);
        sums[i] += x[i];
        keep = keep || !((x[i] < 0 ? -x[i] : x[i]) < bound);
      }
      store4(task.g + (r0 + r) * t.stride + mine, x);
    }
    if (task.filter_eps > 0) {
      const bool kept = __any_sync(kAllLanes, keep) != 0;
      if (!kept) {
        const Real zeros[kVector] = {};
        for (i64 r = 0; r < patch_rows && left > 0; ++r) store4(task.g + (r0 + r) * t.stride + mine, zeros);
        for (Real& s : sums) s = 0;
      }
      if (threadIdx.x % 32 == 0 && left > 0) {
        if (task.flags) task.flags[r0 / kFlagRows * task.flag_stride + mine / kFlagColumns] = kept;
        if (!kept && task.filtered) atomicAdd(reinterpret_cast<unsigned long long*>(task.filtered), 1ull);
      }
    }
    if (task.column_sums && left > 0)
      for (int i = 0; i < kVector; ++i) task.column_sums[r0 / kPatchRows * t.stride + mine + i] = sums[i];
  }
}

constexpr i64 kManyBlocks = i64{1} << 20;

// Calls f with the loss as a constant.
template <class F>
void with_loss(Loss loss, F f) {
  switch (loss) {
    case Loss::bce: return f(std::integral_constant<Loss, Loss::bce>{});
    case Loss::squared_hinge: return f(std::integral_constant<Loss, Loss::squared_hinge>{});
    default: return f(std::integral_constant<Loss, Loss::softmax>{});
  }
}

}  // namespace

template <class W, class Real>
void accumulate_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                     const Pieces& pieces, const RowTargets* rows, const Real* z, RowSums<Real>* sums) {
  with_loss(loss, [&](auto kind) {
    launch(device, blocks_for(place.rows * pieces.slots, 8, kManyBlocks), 256, 0,
           accumulate_kernel<W, decltype(kind)::value, Real>, problem, place, pieces, rows, z, sums);
  });
}

template <class W, class Real>
void gradient_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                   const GradientTask<W, Real>& task) {
  const i64 patches = ceil_div(place.rows, kPatchRows) * ceil_div(place.count, kPatchColumns);
  with_loss(loss, [&](auto kind) {
    launch(device, blocks_for(patches, 1, kManyBlocks), kPatchThreads, 0,
           gradient_kernel<W, decltype(kind)::value, Real>, problem, place, task);
  });
}

}  // namespace widehead::cuda
