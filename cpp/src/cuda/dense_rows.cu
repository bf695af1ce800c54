// dense_rows.cu -- targets checked and summed, incoming gradients turned into factors, sums turned into losses
#include <limits>

#include "cuda/dense_rows.h"
#include "cuda/intrinsics.h"
#include "cuda/loss_math.h"

namespace widehead::cuda {
namespace {

constexpr unsigned kAll = ~0u;
constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ inline i64 global_warp() { return static_cast<i64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; }
__device__ inline i64 warps_in_grid() { return static_cast<i64>(gridDim.x) * (blockDim.x / 32); }
__device__ inline i64 global_thread() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 threads_in_grid() { return static_cast<i64>(gridDim.x) * blockDim.x; }

__device__ inline double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

__device__ inline bool finite(double x) { return x - x == 0; }

// True when the class at `at` stands earlier in its row too.
__device__ bool repeated(const i64* indices, i64 begin, i64 at) {
  for (i64 i = begin; i < at; ++i)
    if (indices[i] == indices[at]) return true;
  return false;
}

// One warp an example.
__global__ void prepare_targets_kernel(Labels t, LossOptions loss, Report report, RowTargets* rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (i64 b = global_warp(); b < t.rows; b += warps_in_grid()) {
    RowTargets row{b, b, 0, 0, RowState::active, t.part};
    if (t.indptr) {
      row.begin = t.indptr[b];
      row.end = t.indptr[b + 1];
      if (row.begin < 0 || row.end < row.begin || row.end > t.size) {
        if (lane == 0) report(Fault::row_pointer, Argument::target, b, row.begin < 0 ? row.begin : row.end, t.size);
        row.begin = row.end = 0;
        row.state = RowState::bad;
      }
    } else if (t.indices[b] == loss.ignore_index) {
      row.state = RowState::ignored;
    } else {
      row.end = b + 1;
    }
    bool bad = false, ascending = true;
    for (i64 j = row.begin + lane; j < row.end; j += 32) {
      const i64 c = t.indices[j];
      const double y = t.values ? static_cast<double>(t.values[j]) : 1.0;
      if (c < 0 || c >= t.n_classes) {
        report(Fault::label_range, Argument::target, j, c, t.n_classes);
        bad = true;
        continue;
      }
      if (!finite(y)) {
        report(Fault::label_weight, Argument::target, j, c, 0);
        bad = true;
      }
      ascending = ascending && (j == row.begin || t.indices[j - 1] < c);
      row.total += y;
      row.weighted += y * (loss.class_weight ? static_cast<double>(loss.class_weight[c]) : 1.0);
    }
    // The usual row ascends; only others pay for the comparison of all pairs.
    if (__any_sync(kAll, !ascending))
      for (i64 j = row.begin + lane; j < row.end; j += 32)
        if (repeated(t.indices, row.begin, j)) {
          report(Fault::label_repeated, Argument::target, j, t.indices[j], 0);
          bad = true;
        }
    row.total = warp_sum(row.total);
    row.weighted = warp_sum(row.weighted);
    if (__any_sync(kAll, bad)) {
      row.end = row.begin;
      row.state = RowState::bad;
    }
    if (lane == 0) rows[b] = row;
  }
}

__global__ void sum_parts_kernel(const float* x, i64 n, double* parts) {
  __shared__ double sums[kWarps];
  double sum = 0;
  for (i64 i = global_thread(); i < n; i += threads_in_grid()) sum += static_cast<double>(x[i]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sums[w];
    parts[blockIdx.x] = sum;
  }
}

// x without weights: every class counts 1.
__global__ void sum_of_parts_kernel(const double* parts, i64 n, double otherwise, double* sum) {
  double total = parts ? 0 : otherwise;
  for (i64 i = 0; parts && i < n; ++i) total += parts[i];
  *sum = total;
}

__device__ double element(const ConstAnyVector& v, i64 i) {
  if (!v.data) return 0;
  return v.dtype == Dtype::f64 ? static_cast<const double*>(v.data)[i]
                               : static_cast<double>(static_cast<const float*>(v.data)[i]);
}

struct Incoming {
  ConstAnyVector losses, output, lse_grad, lse;
};

template <class Real>
__global__ void prepare_gradients_kernel(Incoming in, LossOptions loss, i64 batch, i64 classes, const RowTargets* rows,
                                         const double* class_weight_sum, bool strict, double most, Report report,
                                         RowGradient<Real>* out, float* largest) {
  const bool softmax = loss.kind == Loss::softmax;
  for (i64 b = global_thread(); b < batch; b += threads_in_grid()) {
    const RowTargets row = rows[b];
    const bool active = row.state == RowState::active;
    const double l = element(in.losses, b), o = element(in.output, b), z = softmax ? element(in.lse, b) : 0;
    const double from_lse = softmax ? element(in.lse_grad, b) : 0;
    if (strict) {
      if (!finite(z)) report(Fault::non_finite, Argument::lse, b, 0, 0);
      if (!finite(l)) report(Fault::non_finite, Argument::grad_losses, b, 0, 0);
      if (!finite(o)) report(Fault::non_finite, Argument::grad_output, b, 0, 0);
      if (!finite(from_lse)) report(Fault::non_finite, Argument::grad_lse, b, 0, 0);
    }
    RowGradient<Real> g{static_cast<Real>(z), 0, 0, 0, 0};
    if (active) {
      g.loss = static_cast<Real>(l);
      g.output = static_cast<Real>(o);
      // Bits of floats are ordered as integers if their sign is not set; -0 has one.
      atomicMax(reinterpret_cast<unsigned*>(largest), __float_as_uint(fabsf(static_cast<float>(l))));
    }
    if (softmax) {
      double scale = from_lse;
      const double a = loss.label_smoothing, n = static_cast<double>(classes);
      if (active) {
        scale += l * ((1 - a) * row.weighted + (a > 0 ? a * *class_weight_sum / n : 0) + 2 * loss.lse_penalty * z);
        scale -= o * row.total;
        g.even = static_cast<Real>(l * a / n);
      }
      g.scale = static_cast<Real>(scale);
    } else if (active) {
      g.scale = static_cast<Real>(l);
    }
    // dL/dz goes into products in the weights' type: what that cannot hold would be infinite there.
    if (strict && (fabs(static_cast<double>(g.scale)) > most || fabs(l) + fabs(o) > most))
      report(Fault::non_finite, Argument::grad_losses, b, 0, 0);
    out[b] = g;
  }
}

template <class T>
__device__ inline bool finite_at(const void* data, i64 at) {
  return finite(static_cast<double>(to_float(static_cast<const T*>(data)[at])));
}

__global__ void check_finite_kernel(ConstAnyMatrix m, Argument argument, Report report) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (i64 r = global_warp(); r < m.rows; r += warps_in_grid()) {
    bool ok = true;
    for (i64 c = lane; c < m.cols; c += 32) {
      const i64 at = r * m.stride + c;
      switch (m.dtype) {
        case Dtype::f64: ok = ok && finite_at<double>(m.data, at); break;
        case Dtype::bf16: ok = ok && finite_at<bf16>(m.data, at); break;
        case Dtype::f16: ok = ok && finite_at<f16>(m.data, at); break;
        default: ok = ok && finite_at<float>(m.data, at);
      }
    }
    if (__any_sync(kAll, !ok) && lane == 0) report(Fault::non_finite, argument, r, 0, 0);
  }
}

template <class Real>
__global__ void clear_sums_kernel(RowSums<Real>* sums, i64 n) {
  for (i64 i = global_thread(); i < n; i += threads_in_grid()) sums[i] = {empty_sum<Real>().max, 0, 0, 0, 0, 0, 0};
}

struct Outputs {
  AnyVector losses, output, lse;
};

__device__ void put(const AnyVector& v, i64 i, double x) {
  if (!v.data) return;
  if (v.dtype == Dtype::f64) {
    static_cast<double*>(v.data)[i] = x;
  } else {
    static_cast<float*>(v.data)[i] = static_cast<float>(x);
  }
}

template <class Real>
__global__ void finish_losses_kernel(LossOptions loss, i64 batch, i64 classes, const RowTargets* rows,
                                     const double* class_weight_sum, const RowSums<Real>* sums, int slots,
                                     Outputs out) {
  for (i64 b = global_thread(); b < batch; b += threads_in_grid()) {
    const RowSums<Real>* s = sums + b * slots;
    double top = static_cast<double>(s[0].max), sum = 0, aux = 0, output = 0, adjust = 0;
    for (int i = 1; i < slots; ++i) top = larger(top, static_cast<double>(s[i].max));
    for (int i = 0; i < slots; ++i) {
      sum +=
          (static_cast<double>(s[i].sum) - static_cast<double>(s[i].lost)) * exp(static_cast<double>(s[i].max) - top);
      aux += static_cast<double>(s[i].aux) - static_cast<double>(s[i].aux_lost);
      output += s[i].output;
      adjust += s[i].adjust;
    }
    const RowTargets row = rows[b];
    double value = 0, told = 0;
    if (loss.kind == Loss::softmax) {
      const double lse = top + log(sum), a = loss.label_smoothing;
      put(out.lse, b, lse);
      if (row.state == RowState::active && row.part) {
        value = -(1 - a) * adjust;
        if (a > 0) value -= a / static_cast<double>(classes) * aux;
        told = output;
      } else if (row.state == RowState::active) {
        value = (1 - a) * (row.weighted * lse - adjust) + loss.lse_penalty * lse * lse;
        if (a > 0) value += a / static_cast<double>(classes) * (*class_weight_sum * lse - aux);
        told = output - row.total * lse;
      }
    } else if (row.state == RowState::active) {
      value = aux + adjust;
      told = output;
    }
    if (row.state == RowState::bad) value = told = nan("");
    put(out.losses, b, value);
    put(out.output, b, told);
  }
}

template <class Real>
__global__ void sum_columns_kernel(const Real* parts, i64 blocks, i64 stride, i64 count, Real* out) {
  for (i64 c = global_thread(); c < count; c += threads_in_grid()) {
    Real sum = 0, lost = 0;
    for (i64 b = 0; b < blocks; ++b) kahan_add(sum, lost, parts[b * stride + c]);
    out[c] = sum - lost;
  }
}

}  // namespace

void prepare_targets(const Device& device, const Labels& target, const LossOptions& loss, const Report& report,
                     RowTargets* rows) {
  launch(device, blocks_for(target.rows, kWarps), kThreads, 0, prepare_targets_kernel, target, loss, report, rows);
}

void sum_class_weights(const Device& device, const float* class_weight, i64 classes, double* parts, double* sum) {
  const unsigned blocks = blocks_for(classes, kThreads, kSumParts);
  if (class_weight) launch(device, blocks, kThreads, 0, sum_parts_kernel, class_weight, classes, parts);
  launch(device, 1, 1, 0, sum_of_parts_kernel, class_weight ? parts : nullptr, static_cast<i64>(blocks),
         static_cast<double>(classes), sum);
}

template <class Real>
void prepare_gradients(const DenseBackward& args, const RowTargets* rows, const double* class_weight_sum, bool strict,
                       const Report& report, RowGradient<Real>* out, float* largest) {
  const i64 batch = args.layer.hidden.rows;
  const double most = args.layer.weight.dtype == Dtype::f16 ? 65504.0 : std::numeric_limits<double>::infinity();
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(largest, 0, sizeof(float), static_cast<cudaStream_t>(args.device.stream)));
  launch(args.device, blocks_for(batch, kThreads), kThreads, 0, prepare_gradients_kernel<Real>,
         Incoming{args.grad_losses, args.grad_output, args.grad_lse, args.lse}, args.loss, batch, args.target.n_classes,
         rows, class_weight_sum, strict, most, report, out, largest);
}

void check_finite(const Device& device, const ConstAnyMatrix& m, Argument argument, const Report& report) {
  launch(device, blocks_for(m.rows, kWarps), kThreads, 0, check_finite_kernel, m, argument, report);
}

template <class Real>
void clear_sums(const Device& device, RowSums<Real>* sums, i64 n) {
  launch(device, blocks_for(n, kThreads), kThreads, 0, clear_sums_kernel<Real>, sums, n);
}

template <class Real>
void finish_losses(const Device& device, const LossOptions& loss, i64 batch, i64 classes, const RowTargets* rows,
                   const double* class_weight_sum, const RowSums<Real>* sums, int slots, AnyVector losses,
                   AnyVector output, AnyVector lse) {
  launch(device, blocks_for(batch, 64), 64, 0, finish_losses_kernel<Real>, loss, batch, classes, rows, class_weight_sum,
         sums, slots, Outputs{losses, output, lse});
}

template <class Real>
void sum_columns(const Device& device, const Real* parts, i64 blocks, i64 stride, i64 count, Real* out) {
  launch(device, blocks_for(count, kThreads), kThreads, 0, sum_columns_kernel<Real>, parts, blocks, stride, count, out);
}

template void sum_columns<float>(const Device&, const float*, i64, i64, i64, float*);
template void sum_columns<double>(const Device&, const double*, i64, i64, i64, double*);
template void prepare_gradients<float>(const DenseBackward&, const RowTargets*, const double*, bool, const Report&,
                                       RowGradient<float>*, float*);
template void prepare_gradients<double>(const DenseBackward&, const RowTargets*, const double*, bool, const Report&,
                                        RowGradient<double>*, float*);
template void clear_sums<float>(const Device&, RowSums<float>*, i64);
template void clear_sums<double>(const Device&, RowSums<double>*, i64);
template void finish_losses<float>(const Device&, const LossOptions&, i64, i64, const RowTargets*, const double*,
                                   const RowSums<float>*, int, AnyVector, AnyVector, AnyVector);
template void finish_losses<double>(const Device&, const LossOptions&, i64, i64, const RowTargets*, const double*,
                                    const RowSums<double>*, int, AnyVector, AnyVector, AnyVector);

}  // namespace widehead::cuda
