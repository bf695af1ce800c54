// dense.cu -- the dense head on CUDA: cuBLAS on tiles of classes that stay in the L2 cache, one kernel of ours on each
//
//   forward    Z = X W'        then sums of exp over the tile
//   backward   Z = X W' again, G = dL/dZ, dX += G W, dW = G' X, and the optimiser's step on the tile's rows of W
//
// Everything goes to the caller's stream in order, so a tile's dX sees its weights from before their step.
#include "cuda/convert.h"
#include "cuda/cublas.h"
#include "cuda/dense_tile.h"
#include "cuda/update.h"

namespace widehead::cuda {
namespace {

constexpr i64 kLargestTile = 65536, kLargestChunk = 8192, kSmallestTile = 256;

// How batch and classes are cut: Z of one tile takes about half of the L2 cache, the factors of its product the rest.
struct Cut {
  i64 chunk, tile, stride;
  Pieces pieces;
};

Cut cut(const DenseLayer& layer, const Device& device) {
  const Hardware& h = hardware(device.index);
  const i64 budget = h.l2_bytes / 2 / size_of(layer.weight.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  const i64 batch = at_least(1, layer.hidden.rows), classes = layer.weight.rows;
  Cut c{};
  c.chunk = at_most(batch, at_most(kLargestChunk, at_least(64, budget / (2 * kSmallestTile) / 32 * 32)));
  c.tile = at_most(kLargestTile, at_least(kSmallestTile, budget / c.chunk / 128 * 128));
  c.tile = at_most(c.tile, classes);
  c.stride = round_up(c.tile, kTileAlign);
  // Warps enough to fill the card, but at least 512 classes each.
  const i64 wanted = ceil_div(i64{64} * h.processors, c.chunk);
  const i64 slots = at_most(wanted, at_least(1, c.tile / 512));
  c.pieces.piece = round_up(ceil_div(c.tile, slots), 128);
  c.pieces.slots = static_cast<int>(ceil_div(c.tile, c.pieces.piece));
  return c;
}

// What forward and backward share: the batch in the weights' type, its targets, and the tiles of logits.
template <class W, class Real>
class Tiles {
 public:
  Tiles(const DenseLayer& layer, const Labels& target, const LossOptions& loss, const Device& device, Scratch& scratch)
      : layer_(layer),
        loss_(loss),
        device_(device),
        problem(layer, target, loss),
        cuts(cut(layer, device)),
        targets(scratch.take<RowTargets>(layer.hidden.rows)) {
    refused_ = scratch.take<std::int32_t>(1);
    workspace_ = scratch.take<char>(kCublasWorkspace);
    hidden_ = layer.hidden;
    if (layer.hidden.dtype != layer.weight.dtype) {
      auto* x = scratch.take<W>(layer.hidden.rows * layer.hidden.cols);
      converted_ = {x, layer.weight.dtype, layer.hidden.rows, layer.hidden.cols, layer.hidden.cols};
      hidden_ = converted_;
    }
    z = scratch.take<Real>(cuts.chunk * cuts.stride);
    if (loss.label_smoothing > 0) {
      weight_sum = scratch.take<double>(1);
      parts_ = scratch.take<double>(kSumParts);
    }
  }

  void begin(const Labels& target) {
    if (!device_.refused) {
      WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(refused_, 0, sizeof *refused_, static_cast<cudaStream_t>(device_.stream)));
    }
    prepare_targets(device_, target, loss_, report(), targets);
    if (weight_sum) sum_class_weights(device_, loss_.class_weight, layer_.weight.rows, parts_, weight_sum);
    if (converted_) convert_rows(device_, layer_.hidden, converted_);
  }

  Report report() const { return {device_.faults, device_.refused ? device_.refused : refused_}; }

  // f(place) with the logits of the tile in z; tiles of classes outside, chunks of examples inside.
  template <class F, class After>
  void walk(const Cublas& blas, F f, After after) {
    const i64 batch = layer_.hidden.rows, classes = layer_.weight.rows;
    for (i64 first = 0; first < classes; first += cuts.tile) {
      TilePlace place{0, 0, first, at_most(cuts.tile, classes - first), cuts.stride};
      for (place.row = 0; place.row < batch; place.row += cuts.chunk) {
        place.rows = at_most(cuts.chunk, batch - place.row);
        Product p{place.rows,          place.count, layer_.weight.cols, hidden(place.row), weight(first, true),
                  layer_.weight.dtype, z,           cuts.stride,        real_dtype()};
        p.tf32 = layer_.tf32;
        blas.multiply(p);
        f(place);
      }
      after(place);
    }
  }

  Operand hidden(i64 row) const {
    return {static_cast<const W*>(hidden_.data) + row * hidden_.stride, hidden_.stride, false};
  }
  Operand weight(i64 first, bool transposed) const {
    return {static_cast<const W*>(layer_.weight.data) + first * layer_.weight.stride, layer_.weight.stride, transposed};
  }
  static Dtype real_dtype() { return DtypeOf<Real>::value; }
  Cublas blas() const { return Cublas(device_, workspace_); }

 private:
  const DenseLayer& layer_;
  const LossOptions& loss_;
  const Device& device_;
  std::int32_t* refused_ = nullptr;
  char* workspace_ = nullptr;
  double* parts_ = nullptr;
  ConstAnyMatrix hidden_;
  AnyMatrix converted_;  // where hidden's type is not the weights'

 public:
  Problem<Real> problem;
  Cut cuts;
  RowTargets* targets;
  Real* z = nullptr;
  double* weight_sum = nullptr;
};

template <class W, class Real>
struct Forward {
  Forward(const DenseForward& args, Scratch& scratch)
      : args_(args),
        tiles_(args.layer, args.target, args.loss, args.device, scratch),
        sums_(scratch.take<RowSums<Real>>(args.layer.hidden.rows * tiles_.cuts.pieces.slots)) {}

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.begin(args_.target);
    clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    tiles_.walk(
        tiles_.blas(),
        [&](const TilePlace& place) {
          accumulate_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, tiles_.cuts.pieces,
                                   tiles_.targets, tiles_.z, sums_);
        },
        [](const TilePlace&) {});
    finish_losses(args_.device, args_.loss, batch, args_.layer.weight.rows, tiles_.targets, tiles_.weight_sum, sums_,
                  tiles_.cuts.pieces.slots, args_.losses, args_.output, args_.lse);
  }

 private:
  const DenseForward& args_;
  Tiles<W, Real> tiles_;
  RowSums<Real>* sums_;
};

template <class W, class Real>
class Backward {
 public:
  Backward(const DenseBackward& args, Scratch& scratch)
      : args_(args), tiles_(args.layer, args.target, args.loss, args.device, scratch) {
    const i64 batch = args.layer.hidden.rows, d = args.layer.weight.cols;
    const Cut& cuts = tiles_.cuts;
    gradients_ = scratch.take<RowGradient<Real>>(batch);
    largest_ = scratch.take<float>(1);
    g_ = scratch.take<W>(cuts.chunk * cuts.stride);
    if (args.losses || args.output) sums_ = scratch.take<RowSums<Real>>(batch * cuts.pieces.slots);
    grad_hidden_ = args.grad_hidden;
    if (grad_hidden_ && grad_hidden_.dtype != tiles_.real_dtype())
      grad_hidden_ = {scratch.take<Real>(batch * d), tiles_.real_dtype(), batch, d, d};
    want_weight_ = args.grad_weight || args.update;
    want_bias_ = args.grad_bias || (args.update && args.layer.bias);
    // A gradient in the weights' own type comes from one product; one of several chunks is summed first.
    direct_ = args.grad_weight &&
              (args.grad_weight.dtype == tiles_.real_dtype() ||
               (args.grad_weight.dtype == args.layer.weight.dtype && batch <= cuts.chunk)) &&
              batch > 0;
    if (want_weight_ && !direct_) grad_weight_ = scratch.take<Real>(cuts.tile * d);
    if (want_bias_) {
      column_sums_ = scratch.take<Real>(row_blocks() * cuts.stride);
      grad_bias_ = scratch.take<Real>(cuts.tile);
    }
    if (args.update) step_ = take_step_scratch(scratch, *args.update, args.layer.weight.dtype, cuts.tile);
  }

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.begin(args_.target);
    const Report report = tiles_.report();
    if (args_.update) {
      check_finite(args_.device, args_.layer.hidden, Argument::hidden, report);
      launch_scalars(args_.device, *args_.update, args_.layer.weight.dtype, step_);
    }
    prepare_gradients(args_, tiles_.targets, tiles_.weight_sum, args_.update != nullptr, report, gradients_, largest_);
    if (sums_) clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    if (batch == 0 && grad_weight_)
      WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(
          grad_weight_, 0, static_cast<std::size_t>(tiles_.cuts.tile * args_.layer.weight.cols) * sizeof(Real),
          static_cast<cudaStream_t>(args_.device.stream)));
    const Cublas blas = tiles_.blas();
    tiles_.walk(
        blas, [&](const TilePlace& place) { chunk(blas, place); }, [&](const TilePlace& place) { finish_tile(place); });
    if (sums_)
      finish_losses(args_.device, args_.loss, batch, args_.layer.weight.rows, tiles_.targets, tiles_.weight_sum, sums_,
                    tiles_.cuts.pieces.slots, args_.losses, args_.output, AnyVector{});
    if (grad_hidden_.data != args_.grad_hidden.data) convert_rows(args_.device, grad_hidden_, args_.grad_hidden);
  }

 private:
  i64 blocks_of_chunk() const { return ceil_div(tiles_.cuts.chunk, kPatchRows); }
  i64 row_blocks() const {
    const i64 batch = args_.layer.hidden.rows, chunk = tiles_.cuts.chunk;
    return batch / chunk * blocks_of_chunk() + ceil_div(batch % chunk, kPatchRows);
  }

  void chunk(const Cublas& blas, const TilePlace& place) {
    if (sums_)
      accumulate_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, tiles_.cuts.pieces, tiles_.targets,
                               tiles_.z, sums_);
    GradientTask<W, Real> task{tiles_.targets,         gradients_, tiles_.z, g_, nullptr, largest_, 0, args_.filtered,
                               tiles_.report().refused};
    if (args_.loss.kind == Loss::softmax) task.filter_eps = static_cast<float>(args_.filter_eps);
    if (column_sums_)
      task.column_sums = column_sums_ + place.row / tiles_.cuts.chunk * blocks_of_chunk() * tiles_.cuts.stride;
    gradient_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, task);
    const i64 d = args_.layer.weight.cols;
    const Dtype factors = args_.layer.weight.dtype;
    const Operand g{g_, tiles_.cuts.stride};
    if (grad_hidden_) {
      auto* to = static_cast<Real*>(grad_hidden_.data) + place.row * grad_hidden_.stride;
      multiply(blas, {place.rows, d, place.count, g, tiles_.weight(place.first, false), factors, to,
                      grad_hidden_.stride, tiles_.real_dtype(), place.first > 0});
    }
    if (!want_weight_) return;
    Product p{place.count,
              d,
              place.rows,
              {g_, tiles_.cuts.stride, true},
              tiles_.hidden(place.row),
              factors,
              grad_weight_,
              d,
              tiles_.real_dtype(),
              place.row > 0};
    if (direct_) {
      const AnyMatrix& out = args_.grad_weight;
      p.c = static_cast<char*>(out.data) + place.first * out.stride * size_of(out.dtype);
      p.c_stride = out.stride;
      p.result = out.dtype;
    }
    multiply(blas, p);
  }

  void multiply(const Cublas& blas, Product p) const {
    p.tf32 = args_.layer.tf32;
    blas.multiply(p);
  }

  void finish_tile(const TilePlace& place) {
    const i64 d = args_.layer.weight.cols;
    const std::int32_t* refused = tiles_.report().refused;
    if (args_.update)
      launch_update(args_.device, *args_.update, writable_weight(),
                    {grad_weight_, tiles_.real_dtype(), place.count, d, place.first}, step_, refused);
    if (grad_weight_ && args_.grad_weight)
      convert_rows(args_.device, {grad_weight_, tiles_.real_dtype(), place.count, d, d},
                   rows_of(args_.grad_weight, place.first, place.count));
    if (!want_bias_) return;
    sum_columns(args_.device, column_sums_, row_blocks(), tiles_.cuts.stride, place.count, grad_bias_);
    if (args_.update && args_.layer.bias)
      launch_update_bias(args_.device, *args_.update, writable_bias(),
                         {grad_bias_, tiles_.real_dtype(), place.count, 1, place.first}, step_, refused);
    if (args_.grad_bias) {
      const AnyVector& out = args_.grad_bias;
      convert_rows(
          args_.device, {grad_bias_, tiles_.real_dtype(), 1, place.count, place.count},
          {static_cast<char*>(out.data) + place.first * size_of(out.dtype), out.dtype, 1, place.count, place.count});
    }
  }

  AnyMatrix writable_weight() const {
    const ConstAnyMatrix& w = args_.layer.weight;
    return {const_cast<void*>(w.data), w.dtype, w.rows, w.cols, w.stride};
  }
  AnyVector writable_bias() const {
    const ConstAnyVector& b = args_.layer.bias;
    return {const_cast<void*>(b.data), b.dtype, b.size};
  }
  static AnyMatrix rows_of(const AnyMatrix& m, i64 first, i64 count) {
    return {static_cast<char*>(m.data) + first * m.stride * size_of(m.dtype), m.dtype, count, m.cols, m.stride};
  }

  const DenseBackward& args_;
  Tiles<W, Real> tiles_;
  RowGradient<Real>* gradients_ = nullptr;
  RowSums<Real>* sums_ = nullptr;
  float* largest_ = nullptr;
  W* g_ = nullptr;
  AnyMatrix grad_hidden_;
  Real *grad_weight_ = nullptr, *column_sums_ = nullptr, *grad_bias_ = nullptr;
  StepScratch step_;
  bool want_weight_ = false, want_bias_ = false, direct_ = false;
};

template <class F>
void with_types(const DenseLayer& layer, F f) {
  switch (layer.weight.dtype) {
    case Dtype::f64: return f(double{}, double{});
    case Dtype::bf16: return f(bf16{}, float{});
    case Dtype::f16: return f(f16{}, float{});
    default: return f(float{}, float{});
  }
}

}  // namespace

void dense_forward(const DenseForward& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  with_types(args.layer, [&]<class W, class Real>(W, Real) {
    Scratch scratch(args.device);
    Forward<W, Real>(args, scratch).run();
  });
}

void dense_backward(const DenseBackward& args) {
  const DeviceGuard guard(args.device);
  with_types(args.layer, [&]<class W, class Real>(W, Real) {
    Scratch scratch(args.device);
    Backward<W, Real>(args, scratch).run();
  });
}

std::int64_t scratch_bytes(const DenseForward& args) {
  i64 bytes = 0;
  with_types(args.layer, [&]<class W, class Real>(W, Real) {
    Scratch scratch;
    Forward<W, Real>(args, scratch);
    bytes = scratch.used();
  });
  return bytes;
}

std::int64_t scratch_bytes(const DenseBackward& args) {
  i64 bytes = 0;
  with_types(args.layer, [&]<class W, class Real>(W, Real) {
    Scratch scratch;
    Backward<W, Real>(args, scratch);
    bytes = scratch.used();
  });
  return bytes;
}

}  // namespace widehead::cuda
