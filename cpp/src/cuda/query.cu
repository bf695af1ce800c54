// query.cu -- logits of all classes, and of chosen ones
#include <cmath>

#include "cuda/backend.h"
#include "cuda/convert.h"
#include "cuda/cublas.h"
#include "cuda/fault.h"
#include "cuda/intrinsics.h"
#include "cuda/launch.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr i64 kMostRows = i64{1} << 20, kMostClasses = i64{1} << 20;  // of one product: cuBLAS has 32-bit sizes

// Rows of the batch that go through at a time: what is converted stays in cache until it is read.
i64 rows_at_a_time(const DenseLayer& layer, const Device& device) {
  const Dtype type = layer.weight.dtype;
  const i64 fit = layer.hidden.dtype == type ? kMostRows
                                             : hardware(device.index).l2_bytes / 2 /
                                                   (converted_stride(layer.hidden.cols, type) * size_of(type));
  return at_least(1, at_most(at_least(fit, 64), at_most(kMostRows, layer.hidden.rows)));
}

template <class W>
struct alignas(16) Sixteen {
  static constexpr int kCount = 16 / sizeof(W);
  W at[kCount];
};

template <class W>
struct ScoresOf {
  using Real = RealOf<W>;
  const W *hidden, *weight;
  i64 hidden_stride, weight_stride, features, n_classes;
  bool vectors;  // rows of both begin at multiples of 16 bytes
  ConstAnyVector bias;
  Real softcap;
  const i64* classes;
  i64 n, pairs, first_pair;
  Real* scores;
  i64 scores_stride;
  Report report;
};

// One warp a pair of an example and a class.
template <class W>
__global__ void __launch_bounds__(kThreads) score_pairs(ScoresOf<W> a) {
  using Real = RealOf<W>;
  using Vector = Sixteen<W>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const i64 whole = a.vectors ? a.features - a.features % Vector::kCount : 0;
  const i64 step = static_cast<i64>(gridDim.x) * kWarps;
  for (i64 pair = static_cast<i64>(blockIdx.x) * kWarps + warp; pair < a.pairs; pair += step) {
    const i64 cls = a.classes[pair], row = pair / a.n;
    const bool exists = cls >= 0 && cls < a.n_classes;
    Real sum = 0;
    if (exists) {
      const W *h = a.hidden + row * a.hidden_stride, *w = a.weight + cls * a.weight_stride;
      for (i64 c = lane * Vector::kCount; c < whole; c += 32 * Vector::kCount) {
        const Vector x = *reinterpret_cast<const Vector*>(h + c), y = *reinterpret_cast<const Vector*>(w + c);
#pragma unroll
        for (int i = 0; i < Vector::kCount; ++i) sum += to_float(x.at[i]) * to_float(y.at[i]);
      }
      for (i64 c = whole + lane; c < a.features; c += 32) sum += to_float(h[c]) * to_float(w[c]);
    }
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (lane != 0) continue;
    Real& score = a.scores[row * a.scores_stride + pair % a.n];
    if (exists) {
      const Real z = sum + bias_at<Real>(a.bias, cls);
      score = a.softcap > 0 ? a.softcap * std::tanh(z / a.softcap) : z;
    } else {
      a.report(Fault::row_range, Argument::classes, a.first_pair + pair, cls, a.n_classes);
      score = static_cast<Real>(NAN);
    }
  }
}

bool aligned16(const void* data, i64 stride, Dtype type) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * size_of(type) % 16 == 0;
}

struct ScoresScratch {
  std::int32_t* refused;
  void* hidden;
  ScoresScratch(const DenseLayer& layer, const Device& device, Scratch& scratch)
      : refused(scratch.take<std::int32_t>(1)),
        hidden(take_converted(scratch, layer.hidden, rows_at_a_time(layer, device), layer.weight.dtype)) {}
};

template <class W>
void scores_as(const DenseScores& args) {
  using Real = RealOf<W>;
  const DenseLayer& layer = args.layer;
  const Dtype type = layer.weight.dtype;
  Scratch memory(args.device);
  const ScoresScratch scratch(layer, args.device, memory);
  const Report report{args.device.faults, args.device.refused ? args.device.refused : scratch.refused};
  const i64 each = rows_at_a_time(layer, args.device);
  for (i64 first = 0; first < layer.hidden.rows; first += each) {
    const i64 rows = at_most(each, layer.hidden.rows - first);
    const Operand hidden = as_factor(args.device, layer.hidden, first, rows, type, scratch.hidden);
    const ScoresOf<W> a{
        .hidden = static_cast<const W*>(hidden.data),
        .weight = static_cast<const W*>(layer.weight.data),
        .hidden_stride = hidden.stride,
        .weight_stride = layer.weight.stride,
        .features = layer.weight.cols,
        .n_classes = layer.weight.rows,
        .vectors =
            aligned16(hidden.data, hidden.stride, type) && aligned16(layer.weight.data, layer.weight.stride, type),
        .bias = layer.bias,
        .softcap = static_cast<Real>(args.softcap),
        .classes = args.classes + first * args.n,
        .n = args.n,
        .pairs = rows * args.n,
        .first_pair = first * args.n,
        .scores = static_cast<Real*>(args.scores.data) + first * args.scores.stride,
        .scores_stride = args.scores.stride,
        .report = report,
    };
    launch(args.device, blocks_for(a.pairs, kWarps), kThreads, 0, score_pairs<W>, a);
  }
}

// Bias, soft cap and offset, in this order: the weight of a sampled class is not to be capped. A thread takes a class and
// four examples at a time.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    finish_logits(Real* logits, i64 stride, i64 rows, i64 cols, ConstAnyVector bias, Real cap, const float* offset) {
  constexpr int kRows = 4;
  const i64 step = static_cast<i64>(gridDim.x) * kThreads;
  for (i64 c = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; c < cols; c += step) {
    const Real shift = offset ? static_cast<Real>(offset[c]) : Real{0};
    const Real add = bias_at<Real>(bias, c) + (cap > 0 ? Real{0} : shift);
    for (i64 b = kRows * static_cast<i64>(blockIdx.y); b < rows; b += kRows * static_cast<i64>(gridDim.y)) {
      Real z[kRows];
      Real* at = logits + b * stride + c;
#pragma unroll
      for (int i = 0; i < kRows; ++i) z[i] = b + i < rows ? at[i * stride] + add : Real{0};
      if (cap > 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) z[i] = cap * std::tanh(z[i] / cap) + shift;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (b + i < rows) at[i * stride] = z[i];
    }
  }
}

struct LogitsScratch {
  void *cublas, *hidden;
  LogitsScratch(const DenseLayer& layer, const Device& device, Scratch& scratch)
      : cublas(scratch.take<char>(kCublasWorkspace)),
        hidden(take_converted(scratch, layer.hidden, rows_at_a_time(layer, device), layer.weight.dtype)) {}
};

template <class Real>
void finish(const DenseLogits& args) {
  const DenseLayer& layer = args.layer;
  const i64 rows = layer.hidden.rows, cols = layer.weight.rows;
  const dim3 grid(blocks_for(cols, kThreads), blocks_for(rows, 4, 1024));
  launch(args.device, grid, kThreads, 0, finish_logits<Real>, static_cast<Real*>(args.logits.data), args.logits.stride,
         rows, cols, layer.bias, args.softcap, layer.offset);
}

}  // namespace

void dense_scores(const DenseScores& args) {
  if (args.layer.hidden.rows == 0 || args.n == 0) return;
  const DeviceGuard guard(args.device);
  by_float_type(args.layer.weight.dtype, [&](auto w) { scores_as<decltype(w)>(args); });
}

void dense_logits(const DenseLogits& args) {
  const DenseLayer& layer = args.layer;
  if (layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  const Dtype type = layer.weight.dtype, result = args.logits.dtype;
  Scratch memory(args.device);
  const LogitsScratch scratch(layer, args.device, memory);
  const Cublas cublas(args.device, scratch.cublas);
  const i64 each = rows_at_a_time(layer, args.device);
  for (i64 first = 0; first < layer.hidden.rows; first += each) {
    const i64 rows = at_most(each, layer.hidden.rows - first);
    const Operand hidden = as_factor(args.device, layer.hidden, first, rows, type, scratch.hidden);
    for (i64 c = 0; c < layer.weight.rows; c += kMostClasses)
      cublas.multiply({
          .m = rows,
          .n = at_most(kMostClasses, layer.weight.rows - c),
          .k = layer.weight.cols,
          .a = hidden,
          .b = {static_cast<const char*>(layer.weight.data) + c * layer.weight.stride * size_of(type),
                layer.weight.stride, true},
          .factors = type,
          .c = static_cast<char*>(args.logits.data) + (first * args.logits.stride + c) * size_of(result),
          .c_stride = args.logits.stride,
          .result = result,
          .tf32 = layer.tf32,
      });
  }
  if (!layer.bias && !layer.offset && args.softcap == 0) return;
  if (result == Dtype::f64) {
    finish<double>(args);
  } else {
    finish<float>(args);
  }
}

std::int64_t scratch_bytes(const DenseScores& args) {
  Scratch scratch;
  ScoresScratch(args.layer, args.device, scratch);
  return scratch.used();
}

std::int64_t scratch_bytes(const DenseLogits& args) {
  Scratch scratch;
  LogitsScratch(args.layer, args.device, scratch);
  return scratch.used();
}

}  // namespace widehead::cuda
