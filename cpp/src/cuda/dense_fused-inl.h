// dense_fused-inl.h -- the kernels of the narrow dense head; each type of weights instantiates them in a unit of its own
#pragma once
#include "cuda/dense_fused.h"
#include "cuda/fused_tile.h"
#include "cuda/loss_math.h"
#include "cuda/update.h"

namespace widehead::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAllLanes = ~0u;
constexpr float kLowest = -1e30f;  // times log2(e) it is still finite

// Parts of [0, n) cut at multiples of kStreamRows.
__device__ inline i64 part_begin(i64 n, int parts, int part) {
  return ceil_div(n, kStreamRows) * part / parts * kStreamRows;
}
__device__ inline i64 part_end(i64 n, int parts, int part) { return at_most(part_begin(n, parts, part + 1), n); }

template <class W, int kD>
__device__ inline W* shared_rows() {
  return reinterpret_cast<W*>(dynamic_shared());
}

// One block: 128 examples and a part of the classes.
template <class W, int kD, Loss kLoss>
__global__ void __launch_bounds__(FusedTile<W, kD>::kThreads, FusedTile<W, kD>::kBlocksPerProcessor)
    sums_kernel(FusedProblem<W> p, int parts, RowSums<float>* sums) {
  using Tile = FusedTile<W, kD>;
  constexpr int kRows = 2 * Tile::kRowTiles, kStep = Tile::kStep;
  const i64 row_blocks = ceil_div(p.batch, kOwnRows);
  const i64 first_row = blockIdx.x % row_blocks * kOwnRows;
  const int part = static_cast<int>(blockIdx.x / row_blocks);
  const i64 end = part_end(p.classes, parts, part);
  float top[kRows], sum[kRows], lost[kRows], aux[kRows], aux_lost[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = kLowest;
    sum[r] = lost[r] = aux[r] = aux_lost[r] = 0;
  }
  const auto add = [&](Tile& tile, const W* stream, i64 first) {
#pragma unroll 1
    for (int step = 0; step < kStreamRows && first + step < end; step += kStep) {
      typename Tile::Scores s;
      tile.score(stream, step, s);
      const int left = static_cast<int>(at_most(end - first - step, kStep));
      if (p.bias || left < kStep) {
        const float* bias = p.bias ? p.bias + first + step : nullptr;
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = Tile::column(n, e);
            // Past the end there are zeros; minus infinity drops out of every sum below but that of the logits.
            const float shift = c >= left ? -INFINITY : p.bias ? bias[c] : 0.0f;
#pragma unroll
            for (int t = 0; t < Tile::kRowTiles; ++t) {
              s[t][n][e] += shift;
              s[t][n][e + 2] += shift;
            }
          }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float part_sum = 0, part_aux = 0;
        if (kLoss == Loss::softmax) {
          float peak = top[r];
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) peak = fmaxf(peak, s[r / 2][n][r % 2 * 2 + e]);
          const float shift = -peak * kLog2E;
          const float scale = fast_exp2((top[r] - peak) * kLog2E);
          sum[r] *= scale;
          lost[r] *= scale;
          top[r] = peak;
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) part_sum += fast_exp2(fmaf(s[r / 2][n][r % 2 * 2 + e], kLog2E, shift));
          kahan_add(sum[r], lost[r], part_sum);
        }
        if (kLoss != Loss::softmax || p.smoothing > 0) {
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float z = s[r / 2][n][r % 2 * 2 + e];
              if (kLoss == Loss::softmax) {
                if (Tile::column(n, e) < left) part_aux += z;
              } else if (z != -INFINITY) {  // the loss is 0 there; more registers without the branch
                part_aux += class_loss<kLoss>(z);
              }
            }
          kahan_add(aux[r], aux_lost[r], part_aux);
        }
      }
    }
  };
  Tile tile;
  tile.walk(
      shared_rows<W, kD>(), {p.x, p.batch, p.x_stride, p.features}, first_row, {p.w, p.classes, p.w_stride, p.features},
      part_begin(p.classes, parts, part), end, [](int, i64) {},
      [&](const W* stream, int, i64 first) { add(tile, stream, first); });
  // Four lanes share a row.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    LogSum<float> mine{top[r], sum[r] - lost[r]};
    float total = aux[r] - aux_lost[r];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      mine = merged(
          mine, LogSum<float>{__shfl_xor_sync(kAllLanes, mine.max, step), __shfl_xor_sync(kAllLanes, mine.sum, step)});
      total += __shfl_xor_sync(kAllLanes, total, step);
    }
    const i64 row = first_row + Tile::own_row(r / 2, r % 2);
    if (threadIdx.x % 4 != 0 || row >= p.batch) continue;
    RowSums<float>& out = sums[row * parts + part];
    out.max = mine.max;
    out.sum = mine.sum;
    out.lost = 0;
    out.aux = total;
    out.aux_lost = 0;
  }
}

// dL/dz of a class that is no target.
template <Loss kLoss>
__device__ inline float fused_gradient(float z, float lse2, float scale, float even) {
  if constexpr (kLoss == Loss::softmax) {
    return fmaf(fast_exp2(fmaf(z, kLog2E, -lse2)), scale, -even);
  } else if constexpr (kLoss == Loss::bce) {
    return fast_sigmoid(z) * scale;
  } else {
    return class_gradient<kLoss>(z, 0.0f, scale, 0.0f, 1.0f);
  }
}
template <Loss kLoss>
__device__ inline float fused_change(float z, const FusedRow& row) {
  return kLoss == Loss::softmax ? row.change : target_gradient<kLoss>(z, 1.0f, 1.0f, row.loss, row.output, 0.0f);
}

template <class Scores>
__device__ inline bool all_below(const Scores& s, float bound) {
  bool keep = false;
  for (const auto& tile : s)
    for (const auto& fragment : tile)
      for (float g : fragment) keep = keep || !(fabsf(g) < bound);
  return __any_sync(kAllLanes, keep) == 0;
}

template <class W, int kD, Loss kLoss>
__global__ void __launch_bounds__(FusedTile<W, kD>::kThreads, FusedTile<W, kD>::kBlocksPerProcessor)
    grad_hidden_kernel(FusedProblem<W> p, const FusedRow* rows, int parts, FusedFilter filter, float* partial) {
  using Tile = FusedTile<W, kD>;
  constexpr int kRows = 2 * Tile::kRowTiles, kStep = Tile::kStep;
  const i64 row_blocks = ceil_div(p.batch, kOwnRows);
  const i64 first_row = blockIdx.x % row_blocks * kOwnRows;
  const int part = static_cast<int>(blockIdx.x / row_blocks);
  const i64 begin = part_begin(p.classes, parts, part), end = part_end(p.classes, parts, part);
  const float bound = filter.eps > 0 ? filter.eps * *filter.largest : 0.0f;
  float lse2[kRows], scale[kRows], even[kRows];
  int target[kRows];  // from the part's first class on; -1: elsewhere
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const FusedRow& row = rows[first_row + Tile::own_row(r / 2, r % 2)];  // padded to whole blocks
    lse2[r] = row.lse2;
    scale[r] = row.scale;
    even[r] = row.even;
    target[r] = row.target >= begin && row.target < end ? static_cast<int>(row.target - begin) : -1;
  }
  typename Tile::Sums sums = {};
  Tile tile;
  const auto add = [&](const W* stream, i64 first) {
#pragma unroll 1
    for (int step = 0; step < kStreamRows && first + step < end; step += kStep) {
      typename Tile::Scores s;
      tile.score(stream, step, s);
      const int left = static_cast<int>(at_most(end - first - step, kStep));
      if (p.bias) {
        const float* bias = p.bias ? p.bias + first + step : nullptr;
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float shift = Tile::column(n, e) < left ? bias[Tile::column(n, e)] : 0.0f;
#pragma unroll
            for (int t = 0; t < Tile::kRowTiles; ++t) {
              s[t][n][e] += shift;
              s[t][n][e + 2] += shift;
            }
          }
      }
      // A target among the step's classes is rare, so the usual step does not look for one.
      const int from = static_cast<int>(first - begin) + step;
      bool any = false;
#pragma unroll
      for (int r = 0; r < kRows; ++r) any = any || (target[r] >= from && target[r] < from + kStep);
      const auto gradients = [&](auto with_targets) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& z = s[r / 2][n][r % 2 * 2 + e];
              float g = fused_gradient<kLoss>(z, lse2[r], scale[r], even[r]);
              if constexpr (decltype(with_targets)::value) {
                if (target[r] == from + Tile::column(n, e))
                  g += fused_change<kLoss>(z, rows[first_row + Tile::own_row(r / 2, r % 2)]);
              }
              z = g;
            }
      };
      if (__any_sync(kAllLanes, any)) {
        gradients(std::true_type{});
      } else {
        gradients(std::false_type{});
      }
      // Past the end there are rows of zeros, but a gradient there can be infinite: exp(0 - lse) with lse far below 0.
      if (left < kStep) {
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (Tile::column(n, i) >= left) {
#pragma unroll
              for (int t = 0; t < Tile::kRowTiles; ++t) s[t][n][i] = 0;
            }
      }
      if (bound > 0 && all_below(s, bound)) continue;
      tile.add_product(stream, step, s, sums);
    }
  };
  tile.walk(
      shared_rows<W, kD>(), {p.x, p.batch, p.x_stride, p.features}, first_row, {p.w, p.classes, p.w_stride, p.features},
      begin, end, [](int, i64) {}, [&](const W* stream, int, i64 first) { add(stream, first); });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const i64 row = first_row + Tile::own_row(r / 2, r % 2);
    if (row >= p.batch) continue;
    float* out = partial + (part * p.batch + row) * p.features;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
      if (Tile::column(n, 0) < p.features) {
        out[Tile::column(n, 0)] = sums[r / 2][n][r % 2 * 2];
        out[Tile::column(n, 1)] = sums[r / 2][n][r % 2 * 2 + 1];
      }
  }
}

// Columns [col, col + 8) of a row of dW to the optimiser or to the caller.
template <class W>
__device__ inline void take_gradient(const StepView<W>& view, const UpdateScalars<float>& scalars,
                                     const RandomStream& random, Optimizer optimizer, i64 row, i64 col,
                                     const float (&g)[8]) {
  if (optimizer == Optimizer::adam) {
    step8<Optimizer::adam, true>(view, scalars, random, row, col, g, 0.0f);
  } else if (view.first) {
    step8<Optimizer::sgd, true>(view, scalars, random, row, col, g, 0.0f);
  } else {
    step8<Optimizer::sgd, false>(view, scalars, random, row, col, g, 0.0f);
  }
}
template <class T>
__device__ inline void put_as(void* data, i64 at, const float (&g)[8]) {
  T x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = from_float<T>(g[i]);
  T* to = static_cast<T*>(data) + at;
  store8(to, 8, reinterpret_cast<std::uintptr_t>(to) % 16 == 0, x);
}
__device__ inline void put_gradient(const AnyMatrix& out, i64 row, i64 col, const float (&g)[8]) {
  const i64 at = row * out.stride + col;
  switch (out.dtype) {
    case Dtype::f64: return put_as<double>(out.data, at, g);
    case Dtype::bf16: return put_as<bf16>(out.data, at, g);
    case Dtype::f16: return put_as<f16>(out.data, at, g);
    default: return put_as<float>(out.data, at, g);
  }
}

template <class W>
struct WeightTask {
  FusedWeightTask to;
  StepView<W> view;
  Optimizer optimizer;
};

// One block: 128 classes against the whole batch, then their step.
template <class W, int kD, Loss kLoss>
__global__ void __launch_bounds__(FusedTile<W, kD>::kThreads, FusedTile<W, kD>::kBlocksPerProcessor)
    grad_weight_kernel(FusedProblem<W> p, const FusedRow* rows, FusedFilter filter, WeightTask<W> task) {
  using Tile = FusedTile<W, kD>;
  constexpr int kRows = 2 * Tile::kRowTiles, kStep = Tile::kStep;
  __shared__ FusedRow examples[kStages][kStreamRows];
  const i64 first_class = task.to.first + static_cast<i64>(blockIdx.x) * kOwnRows;
  const float bound = filter.eps > 0 ? filter.eps * *filter.largest : 0.0f;
  float bias[kRows], bias_sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const i64 c = first_class + Tile::own_row(r / 2, r % 2);
    bias[r] = p.bias && c < p.classes ? p.bias[c] : 0.0f;
    bias_sum[r] = 0;
  }
  typename Tile::Sums sums = {};
  Tile tile;
  i64 skipped = 0;
  const i64 warp_class = first_class + static_cast<i64>(threadIdx.x / 32 * (16 * Tile::kRowTiles));
  const bool real_classes = warp_class < p.classes;  // not all of the warp's are padding
  const auto add = [&](const W* stream, const FusedRow* batch, i64 first) {
#pragma unroll 1
    for (int step = 0; step < kStreamRows && first + step < p.batch; step += kStep) {
      typename Tile::Scores s;
      tile.score(stream, step, s);
      // An example of the step whose target is one of the warp's classes is rare: the usual step does not look for it.
      const i64 at = Tile::lane() < kStep ? batch[step + Tile::lane()].target - warp_class : -1;
      const auto gradients = [&](auto with_targets) {
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const FusedRow& example = batch[step + Tile::column(n, e)];
            const float lse2 = example.lse2, scale = example.scale, even = example.even;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              float& z = s[r / 2][n][r % 2 * 2 + e];
              z += bias[r];
              float g = fused_gradient<kLoss>(z, lse2, scale, even);
              if constexpr (decltype(with_targets)::value) {
                if (example.target == first_class + Tile::own_row(r / 2, r % 2)) g += fused_change<kLoss>(z, example);
              }
              z = g;
            }
          }
      };
      if (__any_sync(kAllLanes, at >= 0 && at < 16 * Tile::kRowTiles)) {
        gradients(std::true_type{});
      } else {
        gradients(std::false_type{});
      }
      if (bound > 0 && all_below(s, bound)) {
        skipped += real_classes;
        continue;
      }
      if (task.to.grad_bias) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n) bias_sum[r] += s[r / 2][n][r % 2 * 2] + s[r / 2][n][r % 2 * 2 + 1];
      }
      tile.add_product(stream, step, s, sums);
    }
  };
  tile.walk(
      shared_rows<W, kD>(), {p.w, p.classes, p.w_stride, p.features}, first_class,
      {p.x, p.batch, p.x_stride, p.features}, 0, p.batch,
      [&](int stage, i64 first) {
        static_assert(sizeof examples[0] <= 16 * Tile::kThreads);
        if (threadIdx.x >= sizeof examples[0] / 16) return;
        const auto* from = reinterpret_cast<const char*>(rows + first);  // padded to whole stages
        copy_async16(reinterpret_cast<char*>(examples[stage]) + threadIdx.x * 16, from + threadIdx.x * 16);
      },
      [&](const W* stream, int stage, i64 first) { add(stream, examples[stage], first); });
  if (filter.filtered && skipped > 0 && threadIdx.x % 32 == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(filter.filtered), static_cast<unsigned long long>(skipped));

  // By way of shared memory, so that a thread has eight neighbouring columns.
  constexpr int kStride = kD + 4;
  static_assert(kOwnRows * kStride * 4 <= Tile::kBytes);
  auto* gradient = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = Tile::own_row(r / 2, r % 2);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      gradient[row * kStride + Tile::column(n, 0)] = sums[r / 2][n][r % 2 * 2];
      gradient[row * kStride + Tile::column(n, 1)] = sums[r / 2][n][r % 2 * 2 + 1];
    }
    for (int step = 1; step < 4; step *= 2) bias_sum[r] += __shfl_xor_sync(kAllLanes, bias_sum[r], step);
    const i64 at = first_class + row - task.to.first;
    if (task.to.grad_bias && threadIdx.x % 4 == 0 && at < task.to.count) task.to.grad_bias[at] = bias_sum[r];
  }
  __syncthreads();
  if (task.to.update && *task.to.refused) return;
  const int groups = p.features / 8;
  const UpdateScalars<float> scalars =
      task.to.update ? *static_cast<const UpdateScalars<float>*>(task.to.scalars) : UpdateScalars<float>{};
  const RandomStream random = task.view.random();
  for (int i = static_cast<int>(threadIdx.x); i < kOwnRows * groups; i += Tile::kThreads) {
    const i64 row = first_class + i / groups;
    if (row >= task.to.first + task.to.count) break;
    const int col = i % groups * 8;
    float g[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = gradient[i / groups * kStride + col + j];
    if (task.to.update) {
      take_gradient(task.view, scalars, random, task.optimizer, row, col, g);
    } else if (task.to.grad_weight.data) {
      put_gradient(task.to.grad_weight, row, col, g);
    }
  }
}

// Calls f(width, loss) with both as constants.
template <class F>
void with_shape(int features, Loss loss, F f) {
  const auto with_width = [&](auto kind) {
    if (features <= 64) return f(std::integral_constant<int, 64>{}, kind);
    f(std::integral_constant<int, 128>{}, kind);
  };
  switch (loss) {
    case Loss::bce: return with_width(std::integral_constant<Loss, Loss::bce>{});
    case Loss::squared_hinge: return with_width(std::integral_constant<Loss, Loss::squared_hinge>{});
    default: return with_width(std::integral_constant<Loss, Loss::softmax>{});
  }
}

}  // namespace

template <class W>
void fused_sums(const Device& device, const FusedProblem<W>& p, int parts, RowSums<float>* sums) {
  with_shape(p.features, p.loss, [&](auto width, auto loss) {
    using Tile = FusedTile<W, decltype(width)::value>;
    launch(device, static_cast<unsigned>(ceil_div(p.batch, kOwnRows) * parts), Tile::kThreads, Tile::kBytes,
           sums_kernel<W, decltype(width)::value, decltype(loss)::value>, p, parts, sums);
  });
}

template <class W>
void fused_grad_hidden(const Device& device, const FusedProblem<W>& p, const FusedRow* rows, int parts,
                       const FusedFilter& filter, float* partial) {
  with_shape(p.features, p.loss, [&](auto width, auto loss) {
    using Tile = FusedTile<W, decltype(width)::value>;
    launch(device, static_cast<unsigned>(ceil_div(p.batch, kOwnRows) * parts), Tile::kThreads, Tile::kBytes,
           grad_hidden_kernel<W, decltype(width)::value, decltype(loss)::value>, p, rows, parts, filter, partial);
  });
}

template <class W>
void fused_grad_weight(const Device& device, const FusedProblem<W>& p, const FusedRow* rows, const FusedFilter& filter,
                       const FusedWeightTask& task) {
  WeightTask<W> whole{task, {}, Optimizer::sgd};
  if (task.update) {
    whole.view =
        step_view<W>(*task.update, {const_cast<W*>(p.w), DtypeOf<W>::value, p.classes, p.features, p.w_stride});
    whole.optimizer = task.update->optimizer;
  }
  with_shape(p.features, p.loss, [&](auto width, auto loss) {
    using Tile = FusedTile<W, decltype(width)::value>;
    launch(device, static_cast<unsigned>(ceil_div(task.count, kOwnRows)), Tile::kThreads, Tile::kBytes,
           grad_weight_kernel<W, decltype(width)::value, decltype(loss)::value>, p, rows, filter, whole);
  });
}

}  // namespace widehead::cuda
