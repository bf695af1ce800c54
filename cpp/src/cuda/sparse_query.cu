// sparse_query.cu -- the sparse head's queries on CUDA: logits of all classes and of chosen ones, and the best classes
#include <cmath>

#include "cuda/backend.h"
#include "cuda/sparse_head.h"
#include "cuda/topk.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr i64 kGatheredBytes = i64{64} << 20;  // of X' at a time, about

// One warp a pair of an example and a class; hidden is read where it lies.
template <class W>
__global__ void __launch_bounds__(kThreads)
    score_pairs(SparseWeights<W> s, ConstAnyMatrix hidden, const i64* classes, i64 n, i64 n_classes, RealOf<W>* scores,
                i64 stride, Report report) {
  using Real = RealOf<W>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const i64 pairs = hidden.rows * n, step = static_cast<i64>(gridDim.x) * kWarps;
  for (i64 pair = static_cast<i64>(blockIdx.x) * kWarps + warp; pair < pairs; pair += step) {
    const i64 cls = classes[pair], row = pair / n;
    const bool exists = cls >= 0 && cls < n_classes;
    Real sum = 0;
    if (exists)
      for (i64 k = lane; k < s.inputs.fan_in; k += 32) {
        const i64 at = row * hidden.stride + s.inputs.at(cls, k);
        const Real x = static_cast<Real>(to_float(from_float<W>(number_at<Real>(hidden.data, hidden.dtype, at))));
        sum += static_cast<Real>(to_float(s.weight[cls * s.stride + k])) * x;
      }
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (lane != 0) continue;
    if (!exists) report(Fault::row_range, Argument::classes, pair, cls, n_classes);
    scores[row * stride + pair % n] = exists ? sum + bias_at<Real>(s.bias, cls) : static_cast<Real>(NAN);
  }
}

template <class W>
class SparseLogitSource : public LogitSource {
 public:
  SparseLogitSource(const SparseLayer& layer, const ConstAnyVector& bias, const Device& device)
      : layer_(layer), bias_(bias), device_(device) {}

  i64 most_rows() const override {
    return at_least(64, kGatheredBytes / (at_least(1, layer_.hidden.cols) * size_of(layer_.weight.dtype)) / 64 * 64);
  }
  void take(i64 rows, Scratch& scratch) override {
    padded_ = padded_examples(rows);
    x_ = scratch.take<W>(layer_.hidden.cols * padded_);
  }
  void begin(i64 first, i64 rows) override {
    const ConstAnyMatrix& h = layer_.hidden;
    const auto* data = static_cast<const char*>(h.data) + first * h.stride * size_of(h.dtype);
    gather_hidden(device_, {data, h.dtype, rows, h.cols, h.stride}, padded_, padded_, x_, nullptr);
    rows_ = rows;
  }
  void tile(i64 first, i64 count, void* z, i64 stride) const override {
    gather_logits(device_, weights_of<W>(layer_, bias_, padded_), x_, rows_, first, count, static_cast<RealOf<W>*>(z),
                  stride);
  }

 private:
  const SparseLayer& layer_;
  ConstAnyVector bias_;
  const Device& device_;
  i64 padded_ = 0, rows_ = 0;
  W* x_ = nullptr;
};

DenseTopK dense_call(const SparseTopK& args) {
  DenseTopK out;
  out.layer = as_dense(args.layer);
  out.k = args.k;
  out.exclude_indptr = args.exclude_indptr;
  out.exclude_indices = args.exclude_indices;
  out.exclude_size = args.exclude_size;
  out.scores = args.scores;
  out.classes = args.classes;
  out.lse = args.lse;
  out.device = args.device;
  return out;
}

void topk(const SparseTopK& args, Scratch& scratch) {
  by_sparse_type(args.layer.weight.dtype, [&](auto w) {
    SparseLogitSource<decltype(w)> source(args.layer, {}, args.device);
    select_topk(dense_call(args), source, scratch);
  });
}

void logits(const SparseLogits& args, Scratch& scratch) {
  by_sparse_type(args.layer.weight.dtype, [&](auto w) {
    using Real = RealOf<decltype(w)>;
    SparseLogitSource<decltype(w)> source(args.layer, args.layer.bias, args.device);
    const i64 rows = args.layer.hidden.rows, each = at_least(1, at_most(rows, source.most_rows()));
    source.take(each, scratch);
    if (!scratch.real()) return;
    for (i64 first = 0; first < rows; first += each) {
      source.begin(first, at_most(each, rows - first));
      source.tile(0, args.layer.weight.rows, static_cast<Real*>(args.logits.data) + first * args.logits.stride,
                  args.logits.stride);
    }
  });
}

}  // namespace

void sparse_logits(const SparseLogits& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  logits(args, scratch);
}

void sparse_scores(const SparseScores& args) {
  const SparseLayer& layer = args.layer;
  if (layer.hidden.rows == 0 || args.n == 0) return;
  const DeviceGuard guard(args.device);
  const Report report{args.device.faults, args.device.refused};
  by_sparse_type(layer.weight.dtype, [&](auto w) {
    using W = decltype(w);
    launch(args.device, blocks_for(layer.hidden.rows * args.n, kWarps), kThreads, 0, score_pairs<W>,
           weights_of<W>(layer, layer.bias, 0), layer.hidden, args.classes, args.n, layer.weight.rows,
           static_cast<RealOf<W>*>(args.scores.data), args.scores.stride, report);
  });
}

void sparse_topk(const SparseTopK& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  topk(args, scratch);
}

std::int64_t scratch_bytes(const SparseLogits& args) {
  Scratch scratch;
  logits(args, scratch);
  return scratch.used();
}

std::int64_t scratch_bytes(const SparseScores&) { return 0; }

std::int64_t scratch_bytes(const SparseTopK& args) {
  if (args.layer.hidden.rows == 0) return 0;
  Scratch scratch;
  topk(args, scratch);
  return scratch.used();
}

}  // namespace widehead::cuda
