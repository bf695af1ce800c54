// exact_gradient.cu -- S, S'1 and S'S of a batch on CUDA, and the size of its gradient
#include "cuda/backend.h"
#include "cuda/exact_gradient.h"
#include "cuda/exact_product.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void plan_without_step(StepPlan* plan) {
  plan->go = 1;
  plan->scale = 1;
}

// A warp an example.
template <class View>
__global__ void __launch_bounds__(kThreads)
    scale_gradients(View head, BatchView<typename View::Factor> batch, GradientScratch<typename View::Factor> s,
                    typename View::Factor* directions, const double* column_scale) {
  using Factor = typename View::Factor;
  if (!s.plan->go) return;
  const i64 lane = threadIdx.x % 32, d = head.features;
  const double scale = s.plan->scale, lr = s.plan->lr;
  for (i64 i = thread_in_grid() / 32; i < batch.examples; i += grid_threads() / 32) {
    const RowTargets row = batch.of_example[i];
    const Factor* const h = batch.hidden + i * d;
    double sums = 0, omega = 0, own = 0;
    for (i64 t = row.begin + lane; t < row.end; t += 32) {
      s.grad_A[t] = scale * batch.grad_A[t];
      own += s.grad_A[t];
    }
    for (i64 k = lane; k < d; k += 32) {
      const auto x = static_cast<double>(h[k]);
      sums += head.sums[k] * x;
      omega += head.omega[k] * x;
      if (!directions) continue;
      const double b = column_scale ? x * column_scale[k] : x;
      directions[i * head.width + k] = static_cast<Factor>(-lr * b);
      if (head.velocity) directions[i * head.width + d + k] = static_cast<Factor>(b);
    }
    sums = sum_over_warp(sums);
    omega = sum_over_warp(omega);
    own = sum_over_warp(own);
    if (lane != 0) continue;
    const double by_q = scale * batch.grad_q[i], by_s = scale * batch.grad_s[i];
    s.grad_q[i] = by_q;
    s.grad_s[i] = by_s;
    s.ones[i] = 2 * by_q * sums + static_cast<double>(head.classes) * by_s + own;
    s.drift[i] = 2 * by_q * omega + by_s;
  }
}

// S of the distinct rows, without its sparse part.
template <class View>
struct ByOutput {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = true;
  View head;
  BatchView<Factor> batch;
  GradientScratch<Factor> s;

  __device__ Extent extent(int) const {
    return extent_of(s.plan->go ? batch.distinct() : 0, batch.examples, head.features);
  }
  __device__ bool skips(int, int) const { return false; }
  __device__ Factor a(int, int u, int k) const { return batch.rows[element(u, head.width, k)]; }
  __device__ Factor b(int, int k, int j) const { return batch.hidden[element(j, head.features, k)]; }
  __device__ void store(int, int u, int j, Factor x) const {
    s.by_output[element(u, batch.examples, j)] =
        static_cast<Factor>(2 * s.grad_q[j]) * x + static_cast<Factor>(s.grad_s[j]);
  }
};

// A class stands once in an example: no two targets meet.
template <class Factor>
__global__ void __launch_bounds__(kThreads) add_sparse(BatchView<Factor> batch, GradientScratch<Factor> s) {
  if (!s.plan->go) return;
  for (i64 t = thread_in_grid(); t < batch.targets; t += grid_threads()) {
    const int i = batch.example[t];
    if (i >= 0) s.by_output[element(batch.row[t], batch.examples, i)] += static_cast<Factor>(s.grad_A[t]);
  }
}

// S'S: (2 gq h_j) (S'W)_i + gs_j (S'1)_i, and the sparse part of example j times S.
template <class View>
struct Products {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = true;
  View head;
  BatchView<Factor> batch;
  GradientScratch<Factor> s;

  __device__ Extent extent(int) const {
    return extent_of(s.plan->go ? batch.examples : 0, batch.examples, head.features);
  }
  __device__ bool skips(int, int) const { return false; }
  __device__ Factor a(int, int j, int k) const { return batch.hidden[element(j, head.features, k)]; }
  __device__ Factor b(int, int k, int i) const { return batch.by_rows[element(i, head.width, k)]; }
  __device__ void store(int, int j, int i, Factor x) const {
    double sum = 2 * s.grad_q[j] * s.plan->scale * static_cast<double>(x) + s.grad_s[j] * s.ones[i];
    const RowTargets row = batch.of_example[j];
    for (i64 t = row.begin; t < row.end; ++t)
      sum += s.grad_A[t] * static_cast<double>(s.by_output[element(batch.row[t], batch.examples, i)]);
    s.products[element(j, batch.examples, i)] = static_cast<Factor>(sum);
  }
};

// S'S H [m, d]
template <class View>
struct ProductsByHidden {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = false;
  View head;
  BatchView<Factor> batch;
  const Factor* products;
  Factor* out;

  __device__ Extent extent(int) const { return extent_of(batch.examples, head.features, batch.examples); }
  __device__ bool skips(int, int) const { return false; }
  __device__ Factor a(int, int i, int k) const {
    return Factor(0.5) * (products[element(i, batch.examples, k)] + products[element(k, batch.examples, i)]);
  }
  __device__ Factor b(int, int k, int j) const { return batch.hidden[element(k, head.features, j)]; }
  __device__ void store(int, int i, int j, Factor x) const { out[element(i, head.features, j)] = x; }
};

// diag(H'S'S H): 32 columns a block.
template <class Factor>
__global__ void __launch_bounds__(kThreads) sum_squares(const Factor* by_hidden, const Factor* hidden, i64 examples,
                                                        i64 features, double classes, double* sums, double* columns) {
  __shared__ double parts[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const i64 k = static_cast<i64>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (k < features)
    for (i64 i = warp; i < examples; i += kWarps)
      sum += static_cast<double>(by_hidden[i * features + k]) * static_cast<double>(hidden[i * features + k]);
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || k >= features) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  sums[k] = sum;
  if (columns) columns[k] = sum < 0 ? 0 : sum / classes;
}

// By one warp; below 0 is rounding where all of it cancels.
__global__ void sum_columns_of(const double* sums, i64 n, double* out) {
  double sum = 0;
  for (i64 k = threadIdx.x; k < n; k += 32) sum += sums[k];
  sum = sum_over_warp(sum);
  if (threadIdx.x == 0) *out = sum < 0 ? 0 : sum;
}

template <class Factor>
struct NormScratch {
  GradientScratch<Factor> gradient;
  Factor* by_hidden;
  double* sums;

  NormScratch(const ExactGradient& args, Scratch& scratch) : gradient(args.examples, args.targets, scratch) {
    by_hidden = scratch.take<Factor>(args.examples * args.head.weight.cols);
    sums = scratch.take<double>(args.head.weight.cols);
  }
};

template <class Row, class Factor>
void gradient_as(const ExactGradient& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.head.device;
  const View head = view_of<Row, Factor>(args.head);
  const auto batch = batch_of<Factor>(args, args.examples, args.targets);
  Scratch scratch(device);
  const NormScratch<Factor> s(args, scratch);
  launch(device, 1, 1, 0, plan_without_step, s.gradient.plan);
  gradient_products<Row, Factor>(device, head, batch, s.gradient, nullptr, nullptr);
  launch_product(device, ProductsByHidden<View>{head, batch, s.gradient.products, s.by_hidden}, batch.examples,
                 head.features);
  launch(device, static_cast<unsigned>(ceil_div(head.features, 32)), kThreads, 0, sum_squares<Factor>, s.by_hidden,
         batch.hidden, batch.examples, head.features, static_cast<double>(head.classes), s.sums, args.columns);
  if (args.norm2) launch(device, 1, 32, 0, sum_columns_of, s.sums, head.features, args.norm2);
}

}  // namespace

template <class Row, class Factor>
void gradient_products(const Device& device, const ExactView<Row, Factor>& head, const BatchView<Factor>& batch,
                       const GradientScratch<Factor>& s, Factor* directions, const double* column_scale) {
  using View = ExactView<Row, Factor>;
  launch(device, blocks_for(batch.examples, kWarps), kThreads, 0, scale_gradients<View>, head, batch, s, directions,
         column_scale);
  if (batch.targets > 0) {
    launch_product(device, ByOutput<View>{head, batch, s}, batch.targets, batch.examples);
    launch(device, blocks_for(batch.targets, kThreads), kThreads, 0, add_sparse<Factor>, batch, s);
  }
  launch_product(device, Products<View>{head, batch, s}, batch.examples, batch.examples);
}
template void gradient_products(const Device&, const ExactView<float, float>&, const BatchView<float>&,
                                const GradientScratch<float>&, float*, const double*);
template void gradient_products(const Device&, const ExactView<float, double>&, const BatchView<double>&,
                                const GradientScratch<double>&, double*, const double*);
template void gradient_products(const Device&, const ExactView<double, double>&, const BatchView<double>&,
                                const GradientScratch<double>&, double*, const double*);

i64 scratch_bytes(const ExactGradient& args) {
  Scratch scratch;
  by_exact_types(args.head, [&](auto, auto factor) { NormScratch<decltype(factor)>(args, scratch); });
  return scratch.used();
}

void exact_gradient(const ExactGradient& args) {
  const DeviceGuard guard(args.head.device);
  if (args.examples == 0) {
    const auto clear = [&](double* at, i64 n) {
      if (at)
        WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(at, 0, static_cast<std::size_t>(n) * sizeof *at,
                                            static_cast<cudaStream_t>(args.head.device.stream)));
    };
    clear(args.norm2, 1);
    return clear(args.columns, args.head.weight.cols);
  }
  by_exact_types(args.head, [&](auto row, auto factor) { gradient_as<decltype(row), decltype(factor)>(args); });
}

}  // namespace widehead::cuda
