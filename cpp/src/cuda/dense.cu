// dense.cu -- the dense head on CUDA: cuBLAS on tiles of classes that stay in the L2 cache, one kernel of ours on each
//
//   forward    Z = X W'        then sums of exp over the tile
//   backward   Z = X W' again, G = dL/dZ, dX += G W, dW = G' X, and the optimiser's step on the tile's rows of W
//
// Everything goes to the caller's stream in order, so a tile's dX sees its weights from before their step.
#include <cmath>

#include "cuda/cublas.h"
#include "cuda/dense_batch.h"
#include "cuda/dense_fused.h"
#include "cuda/dense_tile.h"
#include "cuda/filtered_product.h"
#include "cuda/update.h"

namespace widehead::cuda {
namespace {

constexpr i64 kLargestTile = 65536, kSmallestTile = 256;
constexpr i64 kGradientBytes = i64{128} << 20;  // at most, of a tile's dW: small batches have large tiles

// How batch and classes are cut: Z of one tile takes about half of the L2 cache, the factors of its product the rest.
struct Cut {
  i64 chunk, tile, stride;
  Pieces pieces;
};

Cut cut(const DenseLayer& layer, const Device& device) {
  const Hardware& h = hardware(device.index);
  const i64 size = size_of(layer.weight.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32), budget = h.l2_bytes / 2 / size;
  const i64 batch = at_least(1, layer.hidden.rows), classes = layer.weight.rows;
  Cut c{};
  // A chunk reads the tile's weights again, and a tile all of dX: as many examples as classes keep the sum of both small.
  const i64 side = at_least(64, static_cast<i64>(std::sqrt(static_cast<double>(budget))));
  c.chunk = at_most(batch, round_up(ceil_div(batch, ceil_div(batch, side)), kPatchRows));
  c.tile = at_most(kLargestTile, at_least(kSmallestTile, budget / c.chunk / 128 * 128));
  c.tile = at_most(c.tile, at_least(kSmallestTile, kGradientBytes / (size * layer.weight.cols) / 128 * 128));
  c.tile = at_most(c.tile, classes);
  c.stride = round_up(c.tile, kTileAlign);
  // Warps enough to fill the card, but at least 512 classes each.
  const i64 wanted = ceil_div(i64{64} * h.processors, c.chunk);
  const i64 slots = at_most(wanted, at_least(1, c.tile / 512));
  c.pieces.piece = round_up(ceil_div(c.tile, slots), 128);
  c.pieces.slots = static_cast<int>(ceil_div(c.tile, c.pieces.piece));
  return c;
}

// The batch, and its tiles of logits.
template <class W, class Real>
class Tiles {
 public:
  Tiles(const DenseLayer& layer, const Labels& target, const LossOptions& loss, const Device& device, Scratch& scratch)
      : batch(layer, loss, device, scratch),
        problem(layer, target, loss),
        cuts(cut(layer, device)),
        layer_(layer),
        device_(device) {
    workspace_ = scratch.take<char>(kCublasWorkspace);
    z = scratch.take<Real>(cuts.chunk * cuts.stride);
  }

  // f(place) with the logits of the tile in z; tiles of classes outside, chunks of examples inside.
  template <class F, class After>
  void walk(const Cublas& blas, F f, After after) {
    const i64 rows = layer_.hidden.rows, classes = layer_.weight.rows;
    for (i64 first = 0; first < classes; first += cuts.tile) {
      TilePlace place{0, 0, first, at_most(cuts.tile, classes - first), cuts.stride};
      for (place.row = 0; place.row < rows; place.row += cuts.chunk) {
        place.rows = at_most(cuts.chunk, rows - place.row);
        Product p{place.rows,          place.count, layer_.weight.cols, hidden(place.row), weight(first, true),
                  layer_.weight.dtype, z,           cuts.stride,        real_dtype()};
        p.tf32 = layer_.tf32;
        blas.multiply(p);
        f(place);
      }
      after(place);
    }
  }

  Operand hidden(i64 row) const { return {batch.hidden(row), batch.hidden_stride(), false}; }
  Operand weight(i64 first, bool transposed) const { return {batch.weight(first), layer_.weight.stride, transposed}; }
  static Dtype real_dtype() { return DtypeOf<Real>::value; }
  Cublas blas() const { return Cublas(device_, workspace_); }

  Batch<W> batch;
  Problem<Real> problem;
  Cut cuts;
  Real* z = nullptr;

 private:
  const DenseLayer& layer_;
  const Device& device_;
  char* workspace_ = nullptr;
};

template <class W, class Real>
struct Forward {
  Forward(const DenseForward& args, Scratch& scratch)
      : args_(args),
        tiles_(args.layer, args.target, args.loss, args.device, scratch),
        sums_(scratch.take<RowSums<Real>>(args.layer.hidden.rows * tiles_.cuts.pieces.slots)) {}

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.batch.begin(args_.target);
    clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    tiles_.walk(
        tiles_.blas(),
        [&](const TilePlace& place) {
          accumulate_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, tiles_.cuts.pieces,
                                   tiles_.batch.targets, tiles_.z, sums_);
        },
        [](const TilePlace&) {});
    finish_losses(args_.device, args_.loss, batch, args_.target.n_classes, tiles_.batch.targets,
                  tiles_.batch.weight_sum, sums_, tiles_.cuts.pieces.slots, args_.losses, args_.output, args_.lse);
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
    filter_eps_ = args.loss.kind == Loss::softmax ? static_cast<float>(args.filter_eps) : 0.0f;
    if (filter_eps_ > 0) flags_ = scratch.take<unsigned char>(blocks_of_chunk() * flag_stride());
    if (want_bias_) {
      column_sums_ = scratch.take<Real>(row_blocks() * cuts.stride);
      grad_bias_ = scratch.take<Real>(cuts.tile);
    }
    if (args.update) step_ = take_step_scratch(scratch, *args.update, args.layer.weight.dtype, cuts.tile);
  }

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.batch.begin(args_.target);
    const Report report = tiles_.batch.report();
    if (args_.update) {
      check_finite(args_.device, tiles_.batch.factor(), Argument::hidden, report);
      launch_scalars(args_.device, *args_.update, args_.layer.weight.dtype, step_);
    }
    prepare_gradients(args_, tiles_.batch.targets, tiles_.batch.weight_sum, args_.update != nullptr, report, gradients_,
                      largest_);
    if (sums_) clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    if (batch == 0 && grad_weight_)
      WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(
          grad_weight_, 0, static_cast<std::size_t>(tiles_.cuts.tile * args_.layer.weight.cols) * sizeof(Real),
          static_cast<cudaStream_t>(args_.device.stream)));
    const Cublas blas = tiles_.blas();
    tiles_.walk(
        blas, [&](const TilePlace& place) { chunk(blas, place); }, [&](const TilePlace& place) { finish_tile(place); });
    if (sums_)
      finish_losses(args_.device, args_.loss, batch, args_.target.n_classes, tiles_.batch.targets,
                    tiles_.batch.weight_sum, sums_, tiles_.cuts.pieces.slots, args_.losses, args_.output, AnyVector{});
    if (grad_hidden_.data != args_.grad_hidden.data) convert_matrix(args_.device, grad_hidden_, args_.grad_hidden);
  }

 private:
  i64 blocks_of_chunk() const { return ceil_div(tiles_.cuts.chunk, kPatchRows); }
  i64 row_blocks() const {
    const i64 batch = args_.layer.hidden.rows, chunk = tiles_.cuts.chunk;
    return batch / chunk * blocks_of_chunk() + ceil_div(batch % chunk, kPatchRows);
  }

  void chunk(const Cublas& blas, const TilePlace& place) {
    if (sums_)
      accumulate_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, tiles_.cuts.pieces,
                               tiles_.batch.targets, tiles_.z, sums_);
    GradientTask<W, Real> task{tiles_.batch.targets,
                               gradients_,
                               tiles_.z,
                               g_,
                               nullptr,
                               flags_,
                               flag_stride(),
                               largest_,
                               filter_eps_,
                               args_.filtered,
                               tiles_.batch.report().refused};
    if (column_sums_)
      task.column_sums = column_sums_ + place.row / tiles_.cuts.chunk * blocks_of_chunk() * tiles_.cuts.stride;
    gradient_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, task);
    if (grad_hidden_) add_grad_hidden(blas, place);
    if (want_weight_) add_grad_weight(blas, place);
  }

  void add_grad_hidden(const Cublas& blas, const TilePlace& place) {
    const i64 d = args_.layer.weight.cols;
    auto* to = static_cast<Real*>(grad_hidden_.data) + place.row * grad_hidden_.stride;
    const Operand w = tiles_.weight(place.first, false);
    if constexpr (sizeof(W) == 2) {
      if (filters(w, place.rows))
        return filtered_rows(args_.device, filtered(place), static_cast<const W*>(w.data), w.stride,
                             static_cast<int>(d), to, grad_hidden_.stride, place.first > 0);
    }
    multiply(blas, {place.rows,
                    d,
                    place.count,
                    {g_, tiles_.cuts.stride},
                    w,
                    args_.layer.weight.dtype,
                    to,
                    grad_hidden_.stride,
                    tiles_.real_dtype(),
                    place.first > 0});
  }

  void add_grad_weight(const Cublas& blas, const TilePlace& place) {
    const i64 d = args_.layer.weight.cols;
    const Operand x = tiles_.hidden(place.row);
    Product p{place.count,
              d,
              place.rows,
              {g_, tiles_.cuts.stride, true},
              x,
              args_.layer.weight.dtype,
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
    if constexpr (sizeof(W) == 2) {
      if (p.result == Dtype::f32 && filters(x, place.count))
        return filtered_columns(args_.device, filtered(place), static_cast<const W*>(x.data), x.stride,
                                static_cast<int>(d), static_cast<float*>(p.c), p.c_stride, p.accumulate);
    }
    multiply(blas, p);
  }

  // Whether the product with this factor, of m rows, is to leave out what the filter has.
  bool filters(const Operand& factor, i64 m) const {
    return flags_ && filtered_product_fits(args_.device, args_.layer.weight.dtype, factor.data, factor.stride, m,
                                           args_.layer.weight.cols);
  }
  FilteredTile<W> filtered(const TilePlace& place) const {
    return {g_, tiles_.cuts.stride, place.rows, place.count, flags_, flag_stride()};
  }
  i64 flag_stride() const { return ceil_div(tiles_.cuts.stride, kFlagColumns); }

  void multiply(const Cublas& blas, Product p) const {
    p.tf32 = args_.layer.tf32;
    blas.multiply(p);
  }

  void finish_tile(const TilePlace& place) {
    const i64 d = args_.layer.weight.cols;
    const std::int32_t* refused = tiles_.batch.report().refused;
    if (args_.update)
      launch_update(args_.device, *args_.update, writable(args_.layer.weight),
                    {grad_weight_, tiles_.real_dtype(), place.count, d, place.first}, step_, refused);
    if (grad_weight_ && args_.grad_weight)
      convert_matrix(args_.device, {grad_weight_, tiles_.real_dtype(), place.count, d, d},
                     rows_of(args_.grad_weight, place.first, place.count));
    if (!want_bias_) return;
    sum_columns(args_.device, column_sums_, row_blocks(), tiles_.cuts.stride, place.count, grad_bias_);
    if (args_.update && args_.layer.bias)
      launch_update_bias(args_.device, *args_.update, writable(args_.layer.bias),
                         {grad_bias_, tiles_.real_dtype(), place.count, 1, place.first}, step_, refused);
    if (args_.grad_bias) {
      const AnyVector& out = args_.grad_bias;
      convert_matrix(
          args_.device, {grad_bias_, tiles_.real_dtype(), 1, place.count, place.count},
          {static_cast<char*>(out.data) + place.first * size_of(out.dtype), out.dtype, 1, place.count, place.count});
    }
  }

  const DenseBackward& args_;
  Tiles<W, Real> tiles_;
  RowGradient<Real>* gradients_ = nullptr;
  RowSums<Real>* sums_ = nullptr;
  float* largest_ = nullptr;
  W* g_ = nullptr;
  AnyMatrix grad_hidden_;
  Real *grad_weight_ = nullptr, *column_sums_ = nullptr, *grad_bias_ = nullptr;
  unsigned char* flags_ = nullptr;
  float filter_eps_ = 0;
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
  Scratch scratch(args.device);
  if (fused_fits(args.layer, args.target, args.loss, nullptr, args.device)) return fused_forward(args, scratch);
  with_types(args.layer, [&]<class W, class Real>(W, Real) { Forward<W, Real>(args, scratch).run(); });
}

void dense_backward(const DenseBackward& args) {
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  if (fused_fits(args.layer, args.target, args.loss, args.update, args.device)) return fused_backward(args, scratch);
  with_types(args.layer, [&]<class W, class Real>(W, Real) { Backward<W, Real>(args, scratch).run(); });
}

std::int64_t scratch_bytes(const DenseForward& args) {
  Scratch scratch;
  if (fused_fits(args.layer, args.target, args.loss, nullptr, args.device)) {
    fused_forward(args, scratch);
  } else {
    with_types(args.layer, [&]<class W, class Real>(W, Real) { Forward<W, Real>(args, scratch); });
  }
  return scratch.used();
}

std::int64_t scratch_bytes(const DenseBackward& args) {
  Scratch scratch;
  if (fused_fits(args.layer, args.target, args.loss, args.update, args.device)) {
    fused_backward(args, scratch);
  } else {
    with_types(args.layer, [&]<class W, class Real>(W, Real) { Backward<W, Real>(args, scratch); });
  }
  return scratch.used();
}

}  // namespace widehead::cuda
