// tile_driver.h -- how a head walks its classes on a GPU: by tiles whose logits stay in the L2 cache
//
//   forward    Z = products        then sums of exp over the tile
//   backward   Z = products again, G = dL/dZ, the head's dX and dW, and the optimiser's step on the tile's weights
//
// Everything goes to the caller's stream in order, so a tile's dX sees its weights from before their step. The call is
// written as the dense head's: hidden [B, H], weight [D, columns], whatever the columns are to the head. A head has
//
//   W, Real, cuts                 types of weights and sums; how batch and classes are cut
//   begin(strict)                 hidden as its products take it; reports what is not finite there if strict is given
//   logits(place, z)              products of the tile, without the bias
//   take_backward(args, scratch)  before backward: memory of its own
//   filter(task)                  may have the gradient's kernel leave out what is small
//   begin_tile(place)             before a tile's chunks, in backward
//   gradients(place, g)           before the next three
//   add_grad_hidden(place, g), add_grad_weight(place, g, to), finish()
//   direct(grad_weight)           whether dW can be made where the caller wants it
#pragma once
#include "cuda/dense_batch.h"
#include "cuda/dense_tile.h"
#include "cuda/update.h"

namespace widehead::cuda {

// A chunk of examples and a tile of classes at a time; Z and G have `stride` columns.
struct Cut {
  i64 chunk, tile, stride;
  Pieces pieces;

  // Of the tile, for the warps that sum it: enough to fill the card, but at least 512 classes each.
  void cut_pieces(const Hardware& h) {
    stride = round_up(tile, kTileAlign);
    const i64 slots = at_most(ceil_div(i64{64} * h.processors, chunk), at_least(1, tile / 512));
    pieces.piece = round_up(ceil_div(tile, slots), 128);
    pieces.slots = static_cast<int>(ceil_div(tile, pieces.piece));
  }
};

// The batch, and its tiles of logits.
template <class Head>
class Tiles {
 public:
  using Real = typename Head::Real;

  Tiles(const DenseLayer& layer, const Labels& target, const LossOptions& loss, const Device& device, Head& head,
        Scratch& scratch)
      : batch(layer.hidden.rows, loss, device, scratch),
        problem(layer, target, loss),
        cuts(head.cuts),
        layer_(layer),
        head_(head) {
    z = scratch.take<Real>(cuts.chunk * cuts.stride);
  }

  // f(place) with the logits of the tile in z; tiles of classes outside, chunks of examples inside.
  template <class Before, class F, class After>
  void walk(Before before, F f, After after) {
    const i64 rows = layer_.hidden.rows, classes = layer_.weight.rows;
    for (i64 first = 0; first < classes; first += cuts.tile) {
      TilePlace place{0, 0, first, at_most(cuts.tile, classes - first), cuts.stride};
      if (rows > 0) before(place);
      for (place.row = 0; place.row < rows; place.row += cuts.chunk) {
        place.rows = at_most(cuts.chunk, rows - place.row);
        head_.logits(place, z);
        f(place);
      }
      after(place);
    }
  }

  BatchTargets batch;
  Problem<Real> problem;
  const Cut& cuts;
  Real* z = nullptr;

 private:
  const DenseLayer& layer_;
  Head& head_;
};

template <class Head>
class ForwardCall {
 public:
  using W = typename Head::W;
  using Real = typename Head::Real;

  ForwardCall(const DenseForward& args, Head& head, Scratch& scratch)
      : args_(args),
        head_(head),
        tiles_(args.layer, args.target, args.loss, args.device, head, scratch),
        sums_(scratch.take<RowSums<Real>>(args.layer.hidden.rows * tiles_.cuts.pieces.slots)) {}

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.batch.begin(args_.target);
    head_.begin(nullptr);
    clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    tiles_.walk([](const TilePlace&) {},
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
  Head& head_;
  Tiles<Head> tiles_;
  RowSums<Real>* sums_;
};

// Where a tile's dW goes.
struct TileGradient {
  void* data;
  Dtype dtype;
  i64 stride;
  bool accumulate;
};

template <class Head>
class BackwardCall {
 public:
  using W = typename Head::W;
  using Real = typename Head::Real;

  BackwardCall(const DenseBackward& args, Head& head, Scratch& scratch)
      : args_(args), head_(head), tiles_(args.layer, args.target, args.loss, args.device, head, scratch) {
    const i64 batch = args.layer.hidden.rows;
    const Cut& cuts = tiles_.cuts;
    gradients_ = scratch.take<RowGradient<Real>>(batch);
    largest_ = scratch.take<float>(1);
    g_ = scratch.take<W>(cuts.chunk * cuts.stride);
    if (args.losses || args.output) sums_ = scratch.take<RowSums<Real>>(batch * cuts.pieces.slots);
    want_weight_ = args.grad_weight || args.update;
    want_bias_ = args.grad_bias || (args.update && args.layer.bias);
    direct_ = args.grad_weight && batch > 0 && head.direct(args.grad_weight);
    if (want_weight_ && !direct_) grad_weight_ = scratch.take<Real>(cuts.tile * args.layer.weight.cols);
    if (want_bias_) {
      column_sums_ = scratch.take<Real>(row_blocks() * cuts.stride);
      grad_bias_ = scratch.take<Real>(cuts.tile);
    }
    if (args.update) step_ = take_step_scratch(scratch, *args.update, args.layer.weight.dtype, cuts.tile);
    head.take_backward(args, scratch);
  }

  void run() {
    const i64 batch = args_.layer.hidden.rows;
    tiles_.batch.begin(args_.target);
    const Report report = tiles_.batch.report();
    head_.begin(args_.update ? &report : nullptr);
    if (args_.update) launch_scalars(args_.device, *args_.update, args_.layer.weight.dtype, step_);
    prepare_gradients(args_, tiles_.batch.targets, tiles_.batch.weight_sum, args_.update != nullptr, report, gradients_,
                      largest_);
    if (sums_) clear_sums(args_.device, sums_, batch * tiles_.cuts.pieces.slots);
    if (batch == 0 && grad_weight_)
      WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(
          grad_weight_, 0, static_cast<std::size_t>(tiles_.cuts.tile * args_.layer.weight.cols) * sizeof(Real),
          static_cast<cudaStream_t>(args_.device.stream)));
    tiles_.walk([&](const TilePlace& place) { head_.begin_tile(place); }, [&](const TilePlace& place) { chunk(place); },
                [&](const TilePlace& place) { finish_tile(place); });
    if (sums_)
      finish_losses(args_.device, args_.loss, batch, args_.target.n_classes, tiles_.batch.targets,
                    tiles_.batch.weight_sum, sums_, tiles_.cuts.pieces.slots, args_.losses, args_.output, AnyVector{});
    if (args_.grad_hidden) head_.finish();
  }

 private:
  i64 blocks_of_chunk() const { return ceil_div(tiles_.cuts.chunk, kPatchRows); }
  i64 row_blocks() const {
    const i64 batch = args_.layer.hidden.rows, chunk = tiles_.cuts.chunk;
    return batch / chunk * blocks_of_chunk() + ceil_div(batch % chunk, kPatchRows);
  }

  void chunk(const TilePlace& place) {
    if (sums_)
      accumulate_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, tiles_.cuts.pieces,
                               tiles_.batch.targets, tiles_.z, sums_);
    GradientTask<W, Real> task{};
    task.rows = tiles_.batch.targets;
    task.gradients = gradients_;
    task.z = tiles_.z;
    task.g = g_;
    task.largest = largest_;
    task.refused = tiles_.batch.report().refused;
    if (column_sums_)
      task.column_sums = column_sums_ + place.row / tiles_.cuts.chunk * blocks_of_chunk() * tiles_.cuts.stride;
    head_.filter(task);
    gradient_tile<W, Real>(args_.device, args_.loss.kind, tiles_.problem, place, task);
    if (!args_.grad_hidden && !want_weight_) return;
    head_.gradients(place, g_);
    if (args_.grad_hidden) head_.add_grad_hidden(place, g_);
    if (want_weight_) head_.add_grad_weight(place, g_, tile_gradient(place));
  }

  TileGradient tile_gradient(const TilePlace& place) const {
    if (!direct_) return {grad_weight_, DtypeOf<Real>::value, args_.layer.weight.cols, place.row > 0};
    const AnyMatrix out = rows_of(args_.grad_weight, place.first, place.count);
    return {out.data, out.dtype, out.stride, place.row > 0};
  }

  void finish_tile(const TilePlace& place) {
    const i64 columns = args_.layer.weight.cols;
    const Dtype real = DtypeOf<Real>::value;
    const std::int32_t* refused = tiles_.batch.report().refused;
    if (args_.update)
      launch_update(args_.device, *args_.update, writable(args_.layer.weight),
                    {grad_weight_, real, place.count, columns, place.first}, step_, refused);
    if (grad_weight_ && args_.grad_weight)
      convert_matrix(args_.device, {grad_weight_, real, place.count, columns, columns},
                     rows_of(args_.grad_weight, place.first, place.count));
    if (!want_bias_) return;
    sum_columns(args_.device, column_sums_, row_blocks(), tiles_.cuts.stride, place.count, grad_bias_);
    if (args_.update && args_.layer.bias)
      launch_update_bias(args_.device, *args_.update, writable(args_.layer.bias),
                         {grad_bias_, real, place.count, 1, place.first}, step_, refused);
    if (args_.grad_bias)
      convert_matrix(args_.device, {grad_bias_, real, 1, place.count, place.count},
                     slice_of(args_.grad_bias, place.first, place.count));
  }

  const DenseBackward& args_;
  Head& head_;
  Tiles<Head> tiles_;
  RowGradient<Real>* gradients_ = nullptr;
  RowSums<Real>* sums_ = nullptr;
  float* largest_ = nullptr;
  W* g_ = nullptr;
  Real *grad_weight_ = nullptr, *column_sums_ = nullptr, *grad_bias_ = nullptr;
  StepScratch step_;
  bool want_weight_ = false, want_bias_ = false, direct_ = false;
};

}  // namespace widehead::cuda
