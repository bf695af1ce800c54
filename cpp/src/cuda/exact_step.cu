// exact_step.cu -- one SGD step of the exact head on CUDA
//
// Every step launches the same kernels: what it does not need returns at once, and nothing is asked of the device.
#include "cuda/backend.h"
#include "cuda/exact_gradient.h"
#include "cuda/exact_product.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct StepOptions {
  double lr, weight_decay, momentum;
  const float* device_lr;
  const double *grad_scale, *column_scale;
};

// By one block. `report` is the caller's: the batch has told of its own faults already.
template <class View>
__global__ void __launch_bounds__(kThreads) begin_step(View head, BatchView<typename View::Factor> batch, StepOptions o,
                                                       Report report, StepPlan* plan, PlaceTable* places) {
  const ExactHeader& h = *head.header;
  if (threadIdx.x < kPlaces) places->counts[threadIdx.x] = 0;
  bool bad = false;
  for (i64 k = threadIdx.x; o.column_scale && k < head.features; k += kThreads)
    if (!is_finite(o.column_scale[k])) {
      report(Fault::non_finite, Argument::column_scale, k, 0, 0);
      bad = true;
    }
  bad = __syncthreads_or(bad);
  if (threadIdx.x != 0) return;
  StepPlan p{};
  p.lr = o.device_lr ? static_cast<double>(*o.device_lr) : o.lr;
  p.scale = o.grad_scale ? *o.grad_scale : 1.0;
  p.go = !bad && !batch.header->refused && !(report.refused && *report.refused);
  const auto refuse = [&](bool when, Fault fault, Argument argument, i64 value, i64 limit) {
    if (!p.go || !when) return;
    report(fault, argument, 0, value, limit);
    p.go = 0;
  };
  refuse(!batch.header->complete || batch.header->version != h.version, Fault::stale_batch, Argument::batch,
         batch.header->version, h.version);
  refuse(h.steps + 1 >= kMostSteps, Fault::log_full, Argument::batch, h.steps, kMostSteps);
  refuse(!is_finite(p.lr), Fault::non_finite, Argument::lr, 0, 0);
  refuse(!is_finite(p.scale), Fault::non_finite, Argument::grad_scale, 0, 0);
  if (p.lr == 0 && !head.velocity) p.go = 0;
  p.before = LogTime::of(h.steps);
  p.after = {p.before.group, p.before.count + 1};
  for (i64 left = h.steps + 1; left % kRadix == 0; left /= kRadix) ++p.carries;
  p.carry = {1 - p.lr * o.weight_decay, 0, 0, 1};
  if (head.velocity) p.carry = {p.carry.j11, o.weight_decay, -p.lr * o.momentum, o.momentum};
  *plan = p;
}

template <class Factor>
struct StepScratch {
  GradientScratch<Factor> gradient;
  PlaceTable* places;
  Factor* directions;  // B [m, width]
  Factor* pulled;      // Z = S'R J + S'S B / 2 [m, width]
  Factor* turned;      // [8, width, m] the step matrices' first columns times 2 H gq

  StepScratch(const ExactDeviceStep& args, Scratch& scratch) : gradient(args.examples, args.targets, scratch) {
    const i64 width = args.head.weight.cols * (args.head.velocity ? 2 : 1), m = args.examples;
    places = scratch.take<PlaceTable>(1);
    directions = scratch.take<Factor>(m * width);
    pulled = scratch.take<Factor>(m * width);
    turned = scratch.take<Factor>(kRadix * width * m);
  }
};

template <class View>
struct StepOp {
  using Factor = typename View::Factor;
  View head;
  BatchView<Factor> batch;
  StepScratch<Factor> s;

  __device__ const StepPlan& plan() const { return *s.gradient.plan; }
  __device__ i64 if_due(i64 rows) const { return plan().go ? rows : 0; }
  // The matrix z of level 0 takes this step; the one that begins with it is new.
  __device__ i64 if_live(int z, i64 rows) const { return plan().go && z <= plan().before.count ? rows : 0; }
  __device__ bool beside(int z) const { return z == plan().before.count || head.beside_identity(0, z); }
  __device__ Factor* turned(int z) const { return s.turned + z * head.width * batch.examples; }
  __device__ bool skips(int, int) const { return false; }
};

template <class View>
struct Pulled : StepOp<View> {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = false;

  __device__ Extent extent(int) const {
    return extent_of(this->if_due(this->batch.examples), this->head.width, this->batch.examples);
  }
  __device__ Factor a(int, int i, int k) const {
    const Factor* const m = this->s.gradient.products;
    return Factor(0.25) * (m[element(i, this->batch.examples, k)] + m[element(k, this->batch.examples, i)]);
  }
  __device__ Factor b(int, int k, int j) const { return this->s.directions[element(k, this->head.width, j)]; }
  __device__ void store(int, int i, int j, Factor x) const {
    const auto& [head, batch, s] = static_cast<const StepOp<View>&>(*this);
    const Factor own =
        this->plan().carry.carried(batch.by_rows + element(i, head.width, 0), j, head.features, head.velocity);
    s.pulled[element(i, head.width, j)] = static_cast<Factor>(this->plan().scale) * own + x;
  }
};

template <class View>
struct Turned : StepOp<View> {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = true;

  __device__ Extent extent(int z) const {
    const i64 depth = z == this->plan().before.count ? 0 : this->head.features;
    return extent_of(this->if_live(z, this->head.width), this->batch.examples, depth);
  }
  __device__ Factor a(int z, int r, int k) const { return this->head.matrix(0, z)[element(r, this->head.width, k)]; }
  __device__ Factor b(int, int k, int j) const { return this->batch.hidden[element(j, this->head.features, k)]; }
  __device__ void store(int z, int r, int j, Factor x) const {
    const auto& [head, batch, s] = static_cast<const StepOp<View>&>(*this);
    if (r < head.features && this->beside(z)) x += batch.hidden[element(j, head.features, r)];
    this->turned(z)[element(r, batch.examples, j)] = static_cast<Factor>(2 * s.gradient.grad_q[j]) * x;
  }
};

// After carry_all.
template <class View>
struct Matrices : StepOp<View> {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = false;

  __device__ Extent extent(int z) const {
    return extent_of(this->if_live(z, this->head.width), this->head.width, this->batch.examples);
  }
  __device__ Factor a(int z, int r, int k) const { return this->turned(z)[element(r, this->batch.examples, k)]; }
  __device__ Factor b(int, int k, int j) const { return this->s.directions[element(k, this->head.width, j)]; }
  __device__ void store(int z, int r, int j, Factor x) const {
    this->head.matrix(0, z)[element(r, this->head.width, j)] += x;
  }
};

// R'R += Z'B + B'Z: both in one product of twice the depth, of the lower half.
template <class View>
struct Squares : StepOp<View> {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = false, kColumnsByDepth = false;

  __device__ Extent extent(int) const {
    return extent_of(this->if_due(this->head.width), this->head.width, 2 * this->batch.examples);
  }
  __device__ bool skips(int row, int column) const { return column > row; }
  __device__ Factor of(int k, int j, bool swap) const {
    const auto m = static_cast<int>(this->batch.examples);
    const Factor* const from = (k < m) == swap ? this->s.directions : this->s.pulled;
    return from[element(k < m ? k : k - m, this->head.width, j)];
  }
  __device__ Factor a(int, int r, int k) const { return of(k, r, false); }
  __device__ Factor b(int, int k, int j) const { return of(k, j, true); }
  __device__ void store(int, int r, int j, Factor x) const {
    if (j > r) return;
    double* const squares = this->head.squares;
    const i64 at = element(r, this->head.width, j);
    squares[at] = squares[element(j, this->head.width, r)] = squares[at] + static_cast<double>(x);
  }
};

// The targets' rows take a plain step, and go to the store as of after it.
template <class View>
struct Rows : StepOp<View> {
  using Factor = typename View::Factor;
  static constexpr bool kRowsByDepth = true, kColumnsByDepth = false;

  __device__ Extent extent(int) const {
    return extent_of(this->if_due(this->batch.distinct()), this->head.width, this->batch.examples);
  }
  __device__ Factor a(int, int u, int k) const {
    return this->s.gradient.by_output[element(u, this->batch.examples, k)];
  }
  __device__ Factor b(int, int k, int j) const { return this->s.directions[element(k, this->head.width, j)]; }
  __device__ void store(int, int u, int j, Factor x) const {
    const auto& [head, batch, s] = static_cast<const StepOp<View>&>(*this);
    const i64 id = batch.ids[u];
    x += this->plan().carry.carried(batch.rows + element(u, head.width, 0), j, head.features, head.velocity);
    head.stored(id, j) = static_cast<typename View::Row>(static_cast<double>(x) - head.omega[j]);
    if (j != 0) return;
    const auto now = static_cast<std::uint32_t>(this->plan().after.now());
    head.labels[id] = now;
    head.chunk_last[id / kChunk] = now;  // all that come here write the same, and none is larger
  }
};

// omega and R'1: 32 columns of d a block, and the same of the second half.
template <class View>
__global__ void __launch_bounds__(kThreads) move_vectors(StepOp<View> op, const double* column_scale) {
  __shared__ double parts[2][kWarps][32];
  const StepPlan& plan = op.plan();
  if (!plan.go) return;
  const auto& head = op.head;
  const auto& batch = op.batch;
  const auto& gradient = op.s.gradient;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const i64 d = head.features, k = static_cast<i64>(blockIdx.x) * 32 + lane;
  double drift = 0, ones = 0;
  if (k < d)
    for (i64 i = warp; i < batch.examples; i += kWarps) {
      const auto h = static_cast<double>(batch.hidden[i * d + k]);
      drift += gradient.drift[i] * h;
      ones += gradient.ones[i] * h;
    }
  parts[0][warp][lane] = drift;
  parts[1][warp][lane] = ones;
  __syncthreads();
  if (warp != 0 || k >= d) return;
  for (int w = 1; w < kWarps; ++w) {
    drift += parts[0][w][lane];
    ones += parts[1][w][lane];
  }
  const double by = column_scale ? column_scale[k] : 1.0;
  const auto move = [&](double* x, double along) {
    const double first = plan.carry.carried(x, k, d, head.velocity) - plan.lr * along;
    if (head.velocity) x[d + k] = plan.carry.carried(x, d + k, d, true) + along;
    x[k] = first;
  };
  move(head.omega, by * drift);
  move(head.sums, by * ones);
}

// The matrices of level 0 and R'R by J, before what the batch adds. blockIdx.y: a matrix, or after them R'R.
template <class View>
__global__ void __launch_bounds__(kThreads) carry_all(StepOp<View> op) {
  using Factor = typename View::Factor;
  const StepPlan& plan = op.plan();
  if (!plan.go) return;
  const auto& head = op.head;
  const StepCarry j = plan.carry;
  const int z = static_cast<int>(blockIdx.y);
  const i64 d = head.features, width = head.width, halves = head.velocity ? 2 : 1;
  if (z < kRadix) {
    if (z > plan.before.count) return;
    const bool fresh = z == plan.before.count, beside = op.beside(z);
    Factor* const matrix = head.matrix(0, z);
    for (i64 n = thread_in_grid(); n < width * d; n += grid_threads()) {
      const i64 r = n / d, c = n % d;
      Factor* const row = matrix + r * width;
      if (fresh)
        for (i64 h = 0; h < halves; ++h) row[h * d + c] = 0;
      Factor first = j.carried(row, c, d, head.velocity), second = 0;
      if (head.velocity) second = j.carried(row, d + c, d, true);
      if (beside && r % d == c) {
        first += static_cast<Factor>(r < d ? j.j11 - 1 : j.j21);
        second += static_cast<Factor>(r < d ? j.j12 : j.j22 - 1);
      }
      row[c] = first;
      if (head.velocity) row[d + c] = second;
    }
    return;
  }
  for (i64 n = thread_in_grid(); n < d * d; n += grid_threads()) {
    const i64 r = n / d, c = n % d;
    if (!head.velocity) {
      double& x = head.squares[n];
      x *= j.j11 * j.j11;
      continue;
    }
    double* const at[2] = {head.squares + r * width + c, head.squares + (d + r) * width + c};
    double x[2][2];
    for (int h = 0; h < 2; ++h) {
      x[h][0] = j.j11 * at[h][0] + j.j21 * at[h][d];
      x[h][1] = j.j12 * at[h][0] + j.j22 * at[h][d];
    }
    for (int h = 0; h < 2; ++h) {
      at[0][h * d] = j.j11 * x[0][h] + j.j21 * x[1][h];
      at[1][h * d] = j.j12 * x[0][h] + j.j22 * x[1][h];
    }
  }
}

template <class Row, class Factor>
void step_as(const ExactDeviceStep& args) {
  using View = ExactView<Row, Factor>;
  const Device& device = args.head.device;
  const View head = view_of<Row, Factor>(args.head);
  const auto batch = batch_of<Factor>(args, args.examples, args.targets);
  Scratch scratch(device);
  const StepScratch<Factor> s(args, scratch);
  const i64 width = head.width, m = batch.examples;
  const StepOptions options{args.lr,        args.weight_decay, args.momentum,
                            args.device_lr, args.grad_scale,   args.column_scale};
  const StepOp<View> op{head, batch, s};
  launch(device, 1, kThreads, 0, begin_step<View>, head, batch, options, Report{device.faults, device.refused},
         s.gradient.plan, s.places);
  gradient_products<Row, Factor>(device, head, batch, s.gradient, s.directions, args.column_scale);
  launch_product(device, Pulled<View>{op}, m, width);
  launch_product(device, Turned<View>{op}, width, m, kRadix);
  launch(device, static_cast<unsigned>(ceil_div(head.features, 32)), kThreads, 0, move_vectors<View>, op,
         args.column_scale);
  const dim3 grid(blocks_for(width * head.features, 4 * kThreads, 4096), kRadix + 1);
  launch(device, grid, kThreads, 0, carry_all<View>, op);
  launch_product(device, Matrices<View>{op}, width, width, kRadix);
  launch_product(device, Squares<View>{op}, width, width);
  launch_product(device, Rows<View>{op}, batch.targets, width);
  settle_group(device, head, s.gradient.plan);
  advance_log(device, head, s.gradient.plan, s.places, batch);
}

}  // namespace

i64 scratch_bytes(const ExactDeviceStep& args) {
  Scratch scratch;
  by_exact_types(args.head, [&](auto, auto factor) { StepScratch<decltype(factor)>(args, scratch); });
  return scratch.used();
}

void exact_step(const ExactDeviceStep& args) {
  const DeviceGuard guard(args.head.device);
  if (args.examples == 0) return;
  by_exact_types(args.head, [&](auto row, auto factor) { step_as<decltype(row), decltype(factor)>(args); });
}

}  // namespace widehead::cuda
