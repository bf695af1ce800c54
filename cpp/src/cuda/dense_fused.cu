// dense_fused.cu -- the narrow dense head: its order of kernels, and the small ones around them
#include "cuda/dense_batch.h"
#include "cuda/dense_fused.h"
#include "cuda/loss_math.h"
#include "cuda/update.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOwn = 128;  // examples of a block; the batch is padded to it
// Classes of one launch of the weights' kernel: bounds the gradient of the bias that waits for its step.
constexpr i64 kSegment = i64{1} << 20;
constexpr float kNoProbability = 1e30f;  // as lse: exp(z - lse) is 0

// One warp an example: its target's logit, and what that adds to output and loss.
template <class W>
__global__ void target_kernel(FusedProblem<W> p, const RowTargets* rows, const i64* indices, int parts,
                              RowSums<float>* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const i64 warps = static_cast<i64>(gridDim.x) * (blockDim.x / 32);
  for (i64 b = static_cast<i64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; b < p.batch; b += warps) {
    const RowTargets row = rows[b];
    if (row.begin == row.end) continue;
    const i64 c = indices[row.begin];
    float dot = 0;
    for (int k = lane; k < p.features; k += 32)
      dot += to_float(p.x[b * p.x_stride + k]) * to_float(p.w[c * p.w_stride + k]);
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane != 0) continue;
    const double z = static_cast<double>(p.bias ? dot + p.bias[c] : dot);
    RowSums<float>& s = sums[b * parts];
    s.output = z;
    s.adjust = p.loss == Loss::bce             ? target_loss<Loss::bce>(z, 1, 1)
               : p.loss == Loss::squared_hinge ? target_loss<Loss::squared_hinge>(z, 1, 1)
                                               : target_loss<Loss::softmax>(z, 1, 1);
  }
}

__global__ void fused_rows_kernel(i64 batch, i64 padded, float smoothing, const RowTargets* rows, const i64* indices,
                                  const RowGradient<float>* gradients, const std::int32_t* refused, FusedRow* out) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 b = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; b < padded; b += step) {
    FusedRow row{kNoProbability, 0, 0, 0, 0, 0, -1};
    if (b < batch && *refused == 0) {
      const RowGradient<float> g = gradients[b];
      row.lse2 = g.lse * 1.4426950408889634f;
      row.scale = g.scale;
      row.even = g.even;
      row.loss = g.loss;
      row.output = g.output;
      row.change = target_gradient<Loss::softmax>(0.0f, 1.0f, 1.0f, g.loss, g.output, smoothing);
      if (rows[b].begin < rows[b].end) row.target = indices[rows[b].begin];
    }
    out[b] = row;
  }
}

__global__ void sum_parts_kernel(const float* partial, int parts, i64 batch, i64 features, const std::int32_t* refused,
                                 AnyMatrix out) {
  const i64 n = batch * features, step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    float sum = 0;
    // What a refused call has there is 0, or NaN where hidden is.
    for (int p = 0; p < parts && *refused == 0; ++p) sum += partial[p * n + i];
    const i64 at = i / features * out.stride + i % features;
    switch (out.dtype) {
      case Dtype::bf16: static_cast<bf16*>(out.data)[at] = from_float<bf16>(sum); break;
      case Dtype::f16: static_cast<f16*>(out.data)[at] = from_float<f16>(sum); break;
      case Dtype::f64: static_cast<double*>(out.data)[at] = static_cast<double>(sum); break;
      default: static_cast<float*>(out.data)[at] = sum;
    }
  }
}

// Parts of the classes, such that all blocks of a launch are on the card at once.
int parts_of(const DenseLayer& layer, const Device& device) {
  const i64 row_blocks = ceil_div(layer.hidden.rows, kOwn), tiles = ceil_div(layer.weight.rows, 64);
  const i64 slots = i64{2} * hardware(device.index).processors;
  return static_cast<int>(at_most(tiles, at_least(1, slots / row_blocks)));
}

template <class W>
FusedProblem<W> problem_of(const DenseLayer& layer, const LossOptions& loss, const Batch<W>& batch) {
  return {loss.kind,
          batch.hidden(0),
          batch.weight(0),
          layer.hidden.rows,
          layer.weight.rows,
          batch.hidden_stride(),
          layer.weight.stride,
          static_cast<int>(layer.weight.cols),
          static_cast<const float*>(layer.bias.data),
          static_cast<float>(loss.label_smoothing)};
}

// Losses of the batch into whichever of the three the caller wants.
template <class W>
void losses(const Device& device, const FusedProblem<W>& p, const Labels& target, const LossOptions& loss,
            const Batch<W>& batch, int parts, RowSums<float>* sums, AnyVector out_losses, AnyVector output,
            AnyVector lse) {
  clear_sums(device, sums, p.batch * parts);
  fused_sums(device, p, parts, sums);
  launch(device, blocks_for(p.batch, kThreads / 32), kThreads, 0, target_kernel<W>, p, batch.targets, target.indices,
         parts, sums);
  finish_losses(device, loss, p.batch, p.classes, batch.targets, batch.weight_sum, sums, parts, out_losses, output,
                lse);
}

template <class W>
void forward(const DenseForward& args, Scratch& scratch) {
  Batch<W> batch(args.layer, args.loss, args.device, scratch);
  const int parts = parts_of(args.layer, args.device);
  auto* sums = scratch.take<RowSums<float>>(args.layer.hidden.rows * parts);
  if (!scratch.real()) return;
  batch.begin(args.target);
  losses(args.device, problem_of(args.layer, args.loss, batch), args.target, args.loss, batch, parts, sums, args.losses,
         args.output, args.lse);
}

template <class W>
void backward(const DenseBackward& args, Scratch& scratch) {
  const Device& device = args.device;
  const i64 rows = args.layer.hidden.rows, classes = args.layer.weight.rows, d = args.layer.weight.cols;
  const i64 padded = round_up(rows, kOwn);
  const int parts = parts_of(args.layer, device);
  const bool want_losses = args.losses || args.output;
  const bool want_bias = args.grad_bias || (args.update && args.layer.bias);
  Batch<W> batch(args.layer, args.loss, device, scratch);
  auto* gradients = scratch.take<RowGradient<float>>(rows);
  auto* largest = scratch.take<float>(1);
  auto* fused_rows = scratch.take<FusedRow>(padded);
  auto* sums = scratch.take<RowSums<float>>(want_losses ? rows * parts : 0);
  auto* partial = scratch.take<float>(args.grad_hidden ? parts * rows * d : 0);
  auto* grad_bias = scratch.take<float>(want_bias ? at_most(classes, kSegment) : 0);
  StepScratch step;
  if (args.update) step = take_step_scratch(scratch, *args.update, args.layer.weight.dtype, 1);
  if (!scratch.real()) return;

  batch.begin(args.target);
  const Report report = batch.report();
  if (args.update) {
    check_finite(device, batch.factor(), Argument::hidden, report);
    launch_scalars(device, *args.update, args.layer.weight.dtype, step);
  }
  prepare_gradients(args, batch.targets, batch.weight_sum, args.update != nullptr, report, gradients, largest);
  launch(device, blocks_for(padded, kThreads), kThreads, 0, fused_rows_kernel, rows, padded,
         static_cast<float>(args.loss.label_smoothing), batch.targets, args.target.indices, gradients, report.refused,
         fused_rows);
  const FusedProblem<W> p = problem_of(args.layer, args.loss, batch);
  FusedFilter filter{largest, 0, nullptr};
  if (args.loss.kind == Loss::softmax) filter.eps = static_cast<float>(args.filter_eps);
  if (want_losses) losses(device, p, args.target, args.loss, batch, parts, sums, args.losses, args.output, AnyVector{});
  if (args.grad_hidden) {
    fused_grad_hidden(device, p, fused_rows, parts, filter, partial);
    launch(device, blocks_for(rows * d, kThreads), kThreads, 0, sum_parts_kernel, partial, parts, rows, d,
           report.refused, args.grad_hidden);
  }
  if (!args.grad_weight && !args.update && !want_bias) return;
  filter.filtered = args.filtered;
  // After dX: the step changes the weights.
  for (i64 first = 0; first < classes; first += kSegment) {
    const i64 count = at_most(kSegment, classes - first);
    fused_grad_weight(
        device, p, fused_rows, filter,
        {first, count, args.grad_weight, args.update, step.scalars, report.refused, want_bias ? grad_bias : nullptr});
    if (args.update && args.layer.bias)
      launch_update_bias(device, *args.update, writable(args.layer.bias), {grad_bias, Dtype::f32, count, 1, first},
                         step, report.refused);
    if (args.grad_bias)
      convert_matrix(device, {grad_bias, Dtype::f32, 1, count, count}, slice_of(args.grad_bias, first, count));
  }
}

bool in_pieces(const void* data, i64 stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

}  // namespace

bool fused_fits(const DenseLayer& layer, const Labels& target, const LossOptions& loss, const Update* update,
                const Device& device) {
  const ConstAnyMatrix &w = layer.weight, &x = layer.hidden;
  if (size_of(w.dtype) != 2 || w.cols > 128 || w.cols % 8 != 0 || x.rows == 0) return false;
  if (!in_pieces(w.data, w.stride) || (x.dtype == w.dtype && !in_pieces(x.data, x.stride))) return false;
  if (target.part || target.indptr || layer.offset || loss.softcap > 0 || loss.class_weight) return false;
  if (layer.bias && layer.bias.dtype != Dtype::f32) return false;
  if (update && update->optimizer == Optimizer::adagrad) return false;
  return hardware(device.index).capability >= 80;
}

void fused_forward(const DenseForward& args, Scratch& scratch) {
  if (args.layer.weight.dtype == Dtype::bf16) return forward<bf16>(args, scratch);
  forward<f16>(args, scratch);
}

void fused_backward(const DenseBackward& args, Scratch& scratch) {
  if (args.layer.weight.dtype == Dtype::bf16) return backward<bf16>(args, scratch);
  backward<f16>(args, scratch);
}

}  // namespace widehead::cuda
