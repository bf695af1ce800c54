// rows.cu -- rows of a weight matrix: first weights, gather, optimiser steps, and draws of classes
#include <string>

#include "cuda/backend.h"
#include "cuda/fault.h"
#include "cuda/launch.h"
#include "cuda/update.h"
#include "widehead/error.h"
#include "widehead/random.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;

// 2^lanes_log2 threads of a block share a row of so many pieces.
int lanes_log2_for(i64 pieces) {
  int log2 = 0;
  while (log2 < 8 && (i64{1} << log2) < pieces) ++log2;
  return log2;
}

// body(row, lane, lanes) over rows [0, n).
template <class Body>
__device__ inline void for_rows(i64 n, int lanes_log2, const Body& body) {
  const int lanes = 1 << lanes_log2;
  const i64 lane = threadIdx.x & static_cast<unsigned>(lanes - 1);
  const i64 first = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) >> lanes_log2;
  const i64 stride = static_cast<i64>(gridDim.x) * (kThreads >> lanes_log2);
  for (i64 row = first; row < n; row += stride) body(row, lane, lanes);
}

// Columns drawn by blocks of four, and computed as on the CPU: a fused multiply-add would round otherwise.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fill_uniform(T* out, i64 rows, i64 cols, i64 row_stride, bool wide, int lanes_log2, double low, double width,
                 RandomStream random, i64 first_row) {
  for_rows(rows, lanes_log2, [&](i64 row, i64 lane, int lanes) {
    for (i64 col = 8 * lane; col < cols; col += 8 * lanes) {
      const int n = up_to8(cols - col);
      T x[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Philox4 bits =
            random.block(static_cast<std::uint64_t>(first_row + row), static_cast<std::uint32_t>((col >> 2) + half));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[4 * half + i] =
              from_float<T>(__dadd_rn(low, __dmul_rn(width, static_cast<double>(bits.v[i] >> 8) * 0x1.0p-24)));
      }
      store8(out + row * row_stride + col, n, wide && n == 8, x);
    }
  });
}

// Pieces of the size that divides all addresses. Rows out of range give zeros.
template <class Piece>
__global__ void __launch_bounds__(kThreads)
    gather(const Piece* weight, i64 weight_rows, i64 weight_stride, const i64* rows, i64 n, Piece* out, i64 out_stride,
           i64 pieces, int lanes_log2, Report report) {
  for_rows(n, lanes_log2, [&](i64 i, i64 lane, int lanes) {
    const i64 row = rows[i];
    const bool there = row >= 0 && row < weight_rows;
    if (!there && row != -1 && lane == 0) report(Fault::row_range, Argument::rows, i, row, weight_rows);
    for (i64 at = lane; at < pieces; at += lanes) {
      Piece piece{};
      if (there) piece = weight[row * weight_stride + at];
      out[i * out_stride + at] = piece;
    }
  });
}

template <class T>
__device__ inline bool is_finite(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return fabs(x) <= 1.7976931348623157e308;
  } else {
    return fabsf(to_float(x)) <= 3.402823466e38f;
  }
}
__device__ inline bool finite_at(const void* data, Dtype dtype, i64 at) {
  switch (dtype) {
    case Dtype::f64: return is_finite(static_cast<const double*>(data)[at]);
    case Dtype::bf16: return is_finite(static_cast<const bf16*>(data)[at]);
    case Dtype::f16: return is_finite(static_cast<const f16*>(data)[at]);
    default: return is_finite(static_cast<const float*>(data)[at]);
  }
}

// A warp a row: its number, then its gradients. Padding comes last.
__global__ void __launch_bounds__(kThreads)
    check_rows(RowGradients g, i64 cols, const void* grad_bias, Dtype bias_dtype, i64 weight_rows, Report report) {
  const i64 lane = threadIdx.x & 31;
  const i64 first = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  for (i64 i = first; i < g.n; i += static_cast<i64>(gridDim.x) * (kThreads / 32)) {
    const i64 row = g.rows[i];
    bool finite = true;
    if (row != -1)
      for (i64 col = lane; col < cols; col += 32) finite = finite && finite_at(g.data, g.dtype, i * g.stride + col);
    const bool all_finite = __all_sync(~0u, finite);
    if (lane != 0 || row == -1) continue;
    const i64 before = i > 0 ? g.rows[i - 1] : -2;
    if (row < 0 || row >= weight_rows) {
      report(Fault::row_range, Argument::rows, i, row, weight_rows);
    } else if (row == before) {
      report(Fault::row_repeated, Argument::rows, i, row, weight_rows);
    } else if (row < before || before == -1) {
      report(Fault::row_order, Argument::rows, i, row, before);
    } else if (!all_finite) {
      report(Fault::non_finite, Argument::grad, i, 0, 0);
    } else if (grad_bias && !finite_at(grad_bias, bias_dtype, i)) {
      report(Fault::non_finite, Argument::grad_bias, i, 0, 0);
    }
  }
}

// 53 random bits: the classes of a log-uniform draw are resolved up to D of 1e15.
__device__ inline double uniform53(const Philox4& r) {
  const std::uint64_t x = (static_cast<std::uint64_t>(r.v[1]) << 32) | r.v[0];
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

__global__ void __launch_bounds__(kThreads) draw_classes(SampleClasses args) {
  const RandomStream random{args.device_seed ? static_cast<std::uint64_t>(*args.device_seed) : args.seed,
                            Purpose::negatives, args.step};
  const auto classes = static_cast<std::uint64_t>(args.n_classes);
  const double log_classes = ::log1p(static_cast<double>(args.n_classes));
  for (i64 at = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; at < args.n;
       at += static_cast<i64>(gridDim.x) * kThreads) {
    const auto i = static_cast<std::uint64_t>(at);
    i64 drawn = 0;
    if (args.proposal == Proposal::uniform) {
      drawn = static_cast<i64>(random.below(classes, i, 0));
    } else if (args.proposal == Proposal::log_uniform) {
      drawn = static_cast<i64>(::expm1(uniform53(random.block(i, 0)) * log_classes));
      if (drawn >= args.n_classes) drawn = args.n_classes - 1;
    } else {
      const auto column = static_cast<i64>(random.below(classes, i, 0));
      drawn = random.uniform(i, 2) < args.threshold[column] ? column : args.alias[column];
    }
    args.draws[at] = drawn;
  }
}

template <class T>
void fill_as(const AnyMatrix& out, double low, double high, std::uint64_t seed, i64 first_row, const Device& device) {
  T* const data = static_cast<T*>(out.data);
  const int lanes_log2 = lanes_log2_for(ceil_div(out.cols, 8));
  launch(device, blocks_for(out.rows, kThreads >> lanes_log2), kThreads, 0, fill_uniform<T>, data, out.rows, out.cols,
         out.stride, aligned16(data, out.stride), lanes_log2, low, high - low,
         RandomStream{seed, Purpose::init_weight, 0}, first_row);
}

template <class Piece>
void gather_as(const GatherRows& args, i64 row_bytes) {
  constexpr i64 kSize = static_cast<i64>(sizeof(Piece));
  const i64 size = size_of(args.weight.dtype), pieces = row_bytes / kSize;
  const int lanes_log2 = lanes_log2_for(pieces);
  launch(args.device, blocks_for(args.n, kThreads >> lanes_log2), kThreads, 0, gather<Piece>,
         static_cast<const Piece*>(args.weight.data), args.weight.rows, args.weight.stride * size / kSize, args.rows,
         args.n, static_cast<Piece*>(args.out.data), args.out.stride * size / kSize, pieces, lanes_log2,
         Report{args.device.faults, args.device.refused});
}

struct RowsScratch {
  StepScratch step;
  std::int32_t* refused;
};
RowsScratch take_scratch(Scratch& scratch, const UpdateRows& args) {
  RowsScratch s{take_step_scratch(scratch, *args.update, args.weight.dtype, args.n), nullptr};
  s.refused = args.device.refused ? args.device.refused : scratch.take<std::int32_t>(1);
  return s;
}

}  // namespace

void init_uniform(const AnyMatrix& out, double low, double high, std::uint64_t seed, i64 first_row,
                  const Device& device) {
  const DeviceGuard guard(device);
  if (out.rows == 0 || out.cols == 0) return;
  switch (out.dtype) {
    case Dtype::f32: return fill_as<float>(out, low, high, seed, first_row, device);
    case Dtype::f64: return fill_as<double>(out, low, high, seed, first_row, device);
    case Dtype::bf16: return fill_as<bf16>(out, low, high, seed, first_row, device);
    case Dtype::f16: return fill_as<f16>(out, low, high, seed, first_row, device);
    default: throw DtypeError(std::string("out: expected a floating data type, got ") + name_of(out.dtype));
  }
}

void gather_rows(const GatherRows& args) {
  const DeviceGuard guard(args.device);
  const i64 size = size_of(args.weight.dtype), bytes = args.weight.cols * size;
  if (args.n == 0 || bytes == 0) return;
  const auto all = reinterpret_cast<std::uintptr_t>(args.weight.data) |
                   reinterpret_cast<std::uintptr_t>(args.out.data) |
                   static_cast<std::uintptr_t>(bytes | args.weight.stride * size | args.out.stride * size);
  if (all % 16 == 0) return gather_as<uint4>(args, bytes);
  if (all % 8 == 0) return gather_as<uint2>(args, bytes);
  if (all % 4 == 0) return gather_as<std::uint32_t>(args, bytes);
  gather_as<std::uint16_t>(args, bytes);
}

i64 scratch_bytes(const UpdateRows& args) {
  Scratch scratch;
  take_scratch(scratch, args);
  return scratch.used();
}

void update_rows(const UpdateRows& args) {
  const Device& device = args.device;
  const DeviceGuard guard(device);
  if (args.n == 0) return;
  Scratch scratch(device);
  const RowsScratch s = take_scratch(scratch, args);
  if (s.refused != device.refused)
    WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(s.refused, 0, sizeof *s.refused, static_cast<cudaStream_t>(device.stream)));
  const RowGradients g{args.grad.data, args.grad.dtype, args.n, args.grad.stride, 0, args.rows};
  launch(device, blocks_for(args.n, kThreads / 32), kThreads, 0, check_rows, g, args.weight.cols, args.grad_bias.data,
         args.grad_bias.dtype, args.weight.rows, Report{device.faults, s.refused});
  launch_scalars(device, *args.update, args.weight.dtype, s.step);
  launch_update(device, *args.update, args.weight, g, s.step, s.refused);
  if (!args.bias) return;
  const RowGradients b{args.grad_bias.data, args.grad_bias.dtype, args.n, 1, 0, args.rows};
  launch_update_bias(device, *args.update, args.bias, b, s.step, s.refused);
}

void sample_classes(const SampleClasses& args) {
  const DeviceGuard guard(args.device);
  if (args.n > 0) launch(args.device, blocks_for(args.n, kThreads), kThreads, 0, draw_classes, args);
}

}  // namespace widehead::cuda
