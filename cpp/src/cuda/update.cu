// update.cu -- launches of the optimiser's step over rows of weights, and over a bias
#include "cuda/update.h"
#include "widehead/error.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;

template <class Real>
__global__ void fill_scalars(Update u, UpdateScalars<Real>* out) {
  if (threadIdx.x != 0) return;
  const double lr = u.device_lr ? static_cast<double>(*u.device_lr) : u.lr;
  const double step = u.device_step ? static_cast<double>(*u.device_step) + 1.0 : static_cast<double>(u.step);
  *out = UpdateScalars<Real>(u, lr, step);
}

// The row of the matrix that gradient i is for, or -1.
__device__ inline i64 row_of(const RowGradients& g, i64 i) { return g.rows ? g.rows[i] : g.first + i; }

template <class Real>
__device__ inline Real gradient(const RowGradients& g, i64 at) {
  switch (g.dtype) {
    case Dtype::f64: return static_cast<Real>(static_cast<const double*>(g.data)[at]);
    case Dtype::bf16: return to_float(static_cast<const bf16*>(g.data)[at]);
    case Dtype::f16: return to_float(static_cast<const f16*>(g.data)[at]);
    default: return static_cast<const float*>(g.data)[at];
  }
}

template <class T, class Real>
__device__ inline void gradients8_as(const RowGradients& g, i64 at, int n, bool wide, Real (&out)[8]) {
  T x[8] = {};
  load8(static_cast<const T*>(g.data) + at, n, wide, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = static_cast<Real>(to_float(x[i]));
}
template <class Real>
__device__ inline void gradients8(const RowGradients& g, i64 at, int n, bool wide, Real (&out)[8]) {
  switch (g.dtype) {
    case Dtype::f64: return gradients8_as<double>(g, at, n, wide, out);
    case Dtype::bf16: return gradients8_as<bf16>(g, at, n, wide, out);
    case Dtype::f16: return gradients8_as<f16>(g, at, n, wide, out);
    default: return gradients8_as<float>(g, at, n, wide, out);
  }
}

// 2^lanes_log2 neighbouring threads share a row; each steps eight columns at a time.
template <Optimizer kKind, bool kMoments, class W>
__global__ void __launch_bounds__(kThreads)
    step_rows(StepView<W> v, RowGradients g, bool wide, int lanes_log2, const UpdateScalars<RealOf<W>>* scalars,
              const RealOf<W>* row_scales, const std::int32_t* refused) {
  using Real = RealOf<W>;
  if (refused && *refused) return;
  const UpdateScalars<Real> s = *scalars;
  const RandomStream random = v.random();
  const int lanes = 1 << lanes_log2;
  const i64 lane = threadIdx.x & static_cast<unsigned>(lanes - 1);
  const i64 first = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) >> lanes_log2;
  const i64 stride = static_cast<i64>(gridDim.x) * (kThreads >> lanes_log2);
  for (i64 i = first; i < g.n; i += stride) {
    const i64 row = row_of(g, i);
    if (row < 0) continue;
    Real row_scale = 0;
    if constexpr (kKind == Optimizer::adagrad) row_scale = row_scales[i];
    for (i64 col = 8 * lane; col < v.cols; col += 8 * lanes) {
      const int n = up_to8(v.cols - col);
      Real x[8];
      gradients8(g, i * g.stride + col, n, wide && n == 8, x);
      step8<kKind, kMoments>(v, s, random, row, col, x, row_scale);
    }
  }
}

template <class Real>
__device__ inline Real adagrad_scale(const UpdateScalars<Real>& s, Real* state, double mean_square) {
  *state += static_cast<Real>(mean_square);
  return static_cast<Real>(static_cast<double>(s.lr) /
                           (::sqrt(static_cast<double>(*state)) + static_cast<double>(s.eps)));
}

// A warp a row: the accumulator takes the mean square, and lr / (its root + eps) goes to row_scales.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    adagrad_rows(AnyMatrix state, RowGradients g, i64 cols, const UpdateScalars<Real>* scalars, Real* row_scales,
                 const std::int32_t* refused) {
  if (refused && *refused) return;
  const i64 lane = threadIdx.x & 31;
  const i64 first = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  for (i64 i = first; i < g.n; i += static_cast<i64>(gridDim.x) * (kThreads / 32)) {
    const i64 row = row_of(g, i);
    double sum = 0;
    if (row >= 0)
      for (i64 col = lane; col < cols; col += 32) {
        const double x = static_cast<double>(gradient<Real>(g, i * g.stride + col));
        sum += x * x;
      }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0 && row >= 0)
      row_scales[i] =
          adagrad_scale(*scalars, static_cast<Real*>(state.data) + row * state.stride, sum / static_cast<double>(cols));
  }
}

template <class T, class Real>
__device__ inline void store_rounded(T* at, Real x, Rounding rounding, const RandomStream& random, std::uint64_t row) {
  if constexpr (sizeof(T) == 2) {
    if (rounding == Rounding::stochastic) {
      *at = stochastic<T>(static_cast<float>(x), random.bits16(row, 0));
      return;
    }
  }
  *at = from_float<T>(x);
}

// One element a thread. Adagrad keeps one accumulator an element: each is a row of one column.
template <class T, class Real>
__device__ inline void step_element(const Update& u, const UpdateScalars<Real>& s, const RandomStream& random, T* bias,
                                    i64 row, Real g) {
  Real* const m = u.bias_first.data ? static_cast<Real*>(u.bias_first.data) + row : nullptr;
  Real* const v = u.bias_second.data ? static_cast<Real*>(u.bias_second.data) + row : nullptr;
  const bool adagrad = u.optimizer == Optimizer::adagrad;
  const Real row_scale = adagrad ? adagrad_scale(s, v, static_cast<double>(g) * static_cast<double>(g)) : Real{0};
  const Real x = stepped<Real>(s, u.optimizer, static_cast<Real>(to_float(bias[row])), g, m, v, row_scale);
  store_rounded(bias + row, x, u.rounding, random, static_cast<std::uint64_t>(u.first_row + row));
}

template <class Real>
__global__ void __launch_bounds__(kThreads) step_bias(Update u, AnyVector bias, RowGradients g,
                                                      const UpdateScalars<Real>* scalars, const std::int32_t* refused) {
  if (refused && *refused) return;
  const UpdateScalars<Real> s = *scalars;
  const RandomStream random{u.seed, Purpose::rounding_bias,
                            u.device_step ? static_cast<std::uint64_t>(*u.device_step) + 1 : u.step};
  for (i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < g.n;
       i += static_cast<i64>(gridDim.x) * kThreads) {
    const i64 row = row_of(g, i);
    if (row < 0) continue;
    const Real x = gradient<Real>(g, i * g.stride);
    switch (bias.dtype) {
      case Dtype::f64: step_element(u, s, random, static_cast<double*>(bias.data), row, x); break;
      case Dtype::bf16: step_element(u, s, random, static_cast<bf16*>(bias.data), row, x); break;
      case Dtype::f16: step_element(u, s, random, static_cast<f16*>(bias.data), row, x); break;
      default: step_element(u, s, random, static_cast<float*>(bias.data), row, x);
    }
  }
}

template <Optimizer kKind, bool kMoments, class W>
void launch_step(const Device& device, const Update& u, const AnyMatrix& weight, const RowGradients& g,
                 const StepScratch& scratch, const std::int32_t* refused) {
  using Real = RealOf<W>;
  int lanes_log2 = 0;
  while (lanes_log2 < 8 && (i64{8} << lanes_log2) < weight.cols) ++lanes_log2;
  const i64 size = size_of(g.dtype);
  const bool wide = reinterpret_cast<std::uintptr_t>(g.data) % 16 == 0 && g.stride * size % 16 == 0;
  launch(device, blocks_for(g.n, kThreads >> lanes_log2), kThreads, 0, step_rows<kKind, kMoments, W>,
         step_view<W>(u, weight), g, wide, lanes_log2, static_cast<const UpdateScalars<Real>*>(scratch.scalars),
         static_cast<const Real*>(scratch.row_scales), refused);
}

template <class W>
void update_as(const Device& device, const Update& u, const AnyMatrix& weight, const RowGradients& g,
               const StepScratch& scratch, const std::int32_t* refused) {
  using Real = RealOf<W>;
  if (u.optimizer == Optimizer::adam)
    return launch_step<Optimizer::adam, true, W>(device, u, weight, g, scratch, refused);
  if (u.optimizer == Optimizer::adagrad) {
    launch(device, blocks_for(g.n, kThreads / 32), kThreads, 0, adagrad_rows<Real>, u.second, g, weight.cols,
           static_cast<const UpdateScalars<Real>*>(scratch.scalars), static_cast<Real*>(scratch.row_scales), refused);
    return launch_step<Optimizer::adagrad, false, W>(device, u, weight, g, scratch, refused);
  }
  if (u.first) return launch_step<Optimizer::sgd, true, W>(device, u, weight, g, scratch, refused);
  launch_step<Optimizer::sgd, false, W>(device, u, weight, g, scratch, refused);
}

}  // namespace

StepScratch take_step_scratch(Scratch& scratch, const Update& u, Dtype weight, i64 rows) {
  const i64 scales = u.optimizer == Optimizer::adagrad ? rows : 0;
  StepScratch s;
  if (weight == Dtype::f64) {
    s.scalars = scratch.take<UpdateScalars<double>>(1);
    s.row_scales = scratch.take<double>(scales);
  } else {
    s.scalars = scratch.take<UpdateScalars<float>>(1);
    s.row_scales = scratch.take<float>(scales);
  }
  return s;
}

void launch_scalars(const Device& device, const Update& u, Dtype weight, const StepScratch& scratch) {
  if (weight == Dtype::f64)
    return launch(device, 1, 32, 0, fill_scalars<double>, u, static_cast<UpdateScalars<double>*>(scratch.scalars));
  launch(device, 1, 32, 0, fill_scalars<float>, u, static_cast<UpdateScalars<float>*>(scratch.scalars));
}

void launch_update(const Device& device, const Update& u, const AnyMatrix& weight, const RowGradients& g,
                   const StepScratch& scratch, const std::int32_t* refused) {
  if (g.n == 0 || weight.cols == 0) return;
  switch (weight.dtype) {
    case Dtype::f32: return update_as<float>(device, u, weight, g, scratch, refused);
    case Dtype::f64: return update_as<double>(device, u, weight, g, scratch, refused);
    case Dtype::bf16: return update_as<bf16>(device, u, weight, g, scratch, refused);
    case Dtype::f16: return update_as<f16>(device, u, weight, g, scratch, refused);
    default: throw DtypeError(std::string("weight: expected a floating data type, got ") + name_of(weight.dtype));
  }
}

void launch_update_bias(const Device& device, const Update& u, const AnyVector& bias, const RowGradients& g,
                        const StepScratch& scratch, const std::int32_t* refused) {
  if (g.n == 0) return;
  const unsigned blocks = blocks_for(g.n, kThreads);
  if (bias.dtype == Dtype::f64)
    return launch(device, blocks, kThreads, 0, step_bias<double>, u, bias, g,
                  static_cast<const UpdateScalars<double>*>(scratch.scalars), refused);
  launch(device, blocks, kThreads, 0, step_bias<float>, u, bias, g,
         static_cast<const UpdateScalars<float>*>(scratch.scalars), refused);
}

}  // namespace widehead::cuda
