// ranges.cu -- softmax over several ranges of classes on CUDA: the terms of the joint normaliser
#include "cuda/backend.h"
#include "cuda/dense_rows.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 128;

__device__ inline void add(const AnyVector& v, i64 i, double x) {
  if (!v.data) return;
  if (v.dtype == Dtype::f64) {
    static_cast<double*>(v.data)[i] += x;
  } else {
    float& to = static_cast<float*>(v.data)[i];
    to = static_cast<float>(static_cast<double>(to) + x);
  }
}

__global__ void join_kernel(LossOptions loss, i64 batch, i64 classes, const RowTargets* rows,
                            const double* class_weight_sum, ConstAnyVector lse, AnyVector losses, AnyVector output) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 b = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; b < batch; b += step) {
    const RowTargets row = rows[b];
    if (row.state == RowState::ignored) continue;
    const double j = lse.dtype == Dtype::f64 ? static_cast<const double*>(lse.data)[b]
                                             : static_cast<double>(static_cast<const float*>(lse.data)[b]);
    const double a = loss.label_smoothing;
    double factor = (1 - a) * row.weighted, total = row.total;
    if (a > 0) factor += a / static_cast<double>(classes) * *class_weight_sum;
    if (row.state == RowState::bad) factor = total = nan("");
    add(losses, b, factor * j + loss.lse_penalty * j * j);
    add(output, b, -total * j);
  }
}

void join(const JoinSoftmax& args, Scratch& scratch) {
  const Device& device = args.device;
  auto* rows = scratch.take<RowTargets>(args.target.rows);
  auto* sum = scratch.take<double>(1);
  auto* parts = scratch.take<double>(kSumParts);
  if (!scratch.real() || args.target.rows == 0) return;
  prepare_targets(device, args.target, args.loss, {device.faults, device.refused}, rows);
  if (args.loss.label_smoothing > 0)
    sum_class_weights(device, args.loss.class_weight, args.target.n_classes, parts, sum);
  launch(device, blocks_for(args.target.rows, kThreads), kThreads, 0, join_kernel, args.loss, args.target.rows,
         args.target.n_classes, rows, sum, args.lse, args.losses, args.output);
}

}  // namespace

void join_softmax(const JoinSoftmax& args) {
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  join(args, scratch);
}

std::int64_t scratch_bytes(const JoinSoftmax& args) {
  Scratch scratch;
  join(args, scratch);
  return scratch.used();
}

}  // namespace widehead::cuda
