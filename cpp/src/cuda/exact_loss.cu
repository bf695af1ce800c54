// exact_loss.cu -- losses of the spherical family on CUDA from a batch's statistics
#include "cuda/backend.h"
#include "cuda/dense_rows.h"
#include "exact_loss.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 64;

// A thread an example, in the order of its targets as on the CPU.
__global__ void __launch_bounds__(kThreads) spherical_losses(SphericalLossDevice args, const RowTargets* rows) {
  for (i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < args.target.rows;
       i += static_cast<i64>(gridDim.x) * kThreads) {
    const RowTargets target = rows[i];
    SphericalRow row{args.q[i], args.s[i], static_cast<double>(args.target.n_classes)};
    for (i64 t = target.begin; t < target.end; ++t) {
      const double y = args.target.values ? static_cast<double>(args.target.values[t]) : 1.0;
      const double by_A = row.add(args.options, args.A[t], y);
      if (args.grad_A) args.grad_A[t] = by_A;
    }
    row.finish(args.options);
    if (target.state == RowState::bad) row.value = row.grad_q = row.grad_s = nan("");
    if (args.losses) args.losses[i] = row.value;
    if (args.grad_q) args.grad_q[i] = row.grad_q;
    if (args.grad_s) args.grad_s[i] = row.grad_s;
  }
}

}  // namespace

i64 scratch_bytes(const SphericalLossDevice& args) {
  Scratch scratch;
  scratch.take<RowTargets>(args.target.rows);
  return scratch.used();
}

void spherical_loss(const SphericalLossDevice& args) {
  const Device& device = args.device;
  const DeviceGuard guard(device);
  Scratch scratch(device);
  auto* const rows = scratch.take<RowTargets>(args.target.rows);
  const i64 targets = args.target.indptr ? args.target.size : args.target.rows;
  if (args.grad_A && targets > 0)
    WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(args.grad_A, 0xFF, static_cast<std::size_t>(targets) * sizeof(double),
                                        static_cast<cudaStream_t>(device.stream)));  // NaN
  if (args.target.rows == 0) return;
  LossOptions none;
  none.ignore_index = args.ignore_index;
  prepare_targets(device, args.target, none, {device.faults, device.refused}, rows);
  launch(device, blocks_for(args.target.rows, kThreads), kThreads, 0, spherical_losses, args, rows);
}

}  // namespace widehead::cuda
