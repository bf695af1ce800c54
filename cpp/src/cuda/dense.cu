// dense.cu -- the dense head on CUDA: its products by cuBLAS, on tiles of classes that stay in the L2 cache
#include <cmath>
#include <optional>

#include "cuda/cublas.h"
#include "cuda/dense_fused.h"
#include "cuda/filtered_product.h"
#include "cuda/tile_driver.h"

namespace widehead::cuda {
namespace {

constexpr i64 kLargestTile = 65536, kSmallestTile = 256;
constexpr i64 kGradientBytes = i64{128} << 20;  // at most, of a tile's dW: small batches have large tiles

// How batch and classes are cut: Z of one tile takes about half of the L2 cache, the factors of its product the rest.
Cut cut(const DenseLayer& layer, const Device& device) {
  const Hardware& h = hardware(device.index);
  const i64 size = size_of(layer.weight.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32), budget = h.l2_bytes / 2 / size;
  const i64 batch = at_least(1, layer.hidden.rows), classes = at_least(1, layer.weight.rows);
  Cut c{};
  // A chunk reads the tile's weights again, and a tile all of dX: as many examples as classes keep the sum of both small.
  const i64 side = at_least(64, static_cast<i64>(std::sqrt(static_cast<double>(budget))));
  c.chunk = at_most(batch, round_up(ceil_div(batch, ceil_div(batch, side)), kPatchRows));
  c.tile = at_most(kLargestTile, at_least(kSmallestTile, budget / c.chunk / 128 * 128));
  c.tile =
      at_most(c.tile, at_least(kSmallestTile, kGradientBytes / (size * at_least(1, layer.weight.cols)) / 128 * 128));
  c.tile = at_most(c.tile, classes);
  c.cut_pieces(h);
  return c;
}

template <class Weight>
class DenseProducts {
 public:
  using W = Weight;
  using Real = RealOf<W>;

  DenseProducts(const DenseLayer& layer, const Device& device, Scratch& scratch)
      : cuts(cut(layer, device)), layer_(layer), device_(device), factors_(layer, device, scratch) {
    workspace_ = scratch.take<char>(kCublasWorkspace);
  }

  void take_backward(const DenseBackward& args, Scratch& scratch) {
    wanted_ = grad_hidden_ = args.grad_hidden;
    if (grad_hidden_ && grad_hidden_.dtype != kReal) {
      const i64 batch = args.layer.hidden.rows, d = args.layer.weight.cols;
      grad_hidden_ = {scratch.take<Real>(batch * d), kReal, batch, d, d};
    }
    filter_eps_ = args.loss.kind == Loss::softmax ? static_cast<float>(args.filter_eps) : 0.0f;
    filtered_ = args.filtered;
    if (filter_eps_ > 0) flags_ = scratch.take<unsigned char>(ceil_div(cuts.chunk, kPatchRows) * flag_stride());
  }

  void begin(const Report* strict) {
    blas_.emplace(device_, workspace_);
    factors_.convert();
    if (strict) check_finite(device_, factors_.factor(), Argument::hidden, *strict);
  }

  void logits(const TilePlace& place, Real* z) const {
    multiply({place.rows, place.count, layer_.weight.cols, hidden(place.row), weight(place.first, true),
              layer_.weight.dtype, z, cuts.stride, kReal});
  }

  void filter(GradientTask<W, Real>& task) const {
    task.flags = flags_;
    task.flag_stride = flag_stride();
    task.filter_eps = filter_eps_;
    task.filtered = filtered_;
  }

  void begin_tile(const TilePlace&) const {}
  void gradients(const TilePlace&, const W*) const {}

  void add_grad_hidden(const TilePlace& place, const W* g) const {
    const i64 d = layer_.weight.cols;
    auto* to = static_cast<Real*>(grad_hidden_.data) + place.row * grad_hidden_.stride;
    const Operand w = weight(place.first, false);
    if constexpr (sizeof(W) == 2) {
      if (filters(w, place.rows))
        return filtered_rows(device_, filtered(place, g), static_cast<const W*>(w.data), w.stride, static_cast<int>(d),
                             to, grad_hidden_.stride, place.first > 0);
    }
    multiply({place.rows,
              d,
              place.count,
              {g, cuts.stride},
              w,
              layer_.weight.dtype,
              to,
              grad_hidden_.stride,
              kReal,
              place.first > 0});
  }

  void add_grad_weight(const TilePlace& place, const W* g, const TileGradient& to) const {
    const i64 d = layer_.weight.cols;
    const Operand x = hidden(place.row);
    if constexpr (sizeof(W) == 2) {
      if (to.dtype == Dtype::f32 && filters(x, place.count))
        return filtered_columns(device_, filtered(place, g), static_cast<const W*>(x.data), x.stride,
                                static_cast<int>(d), static_cast<float*>(to.data), to.stride, to.accumulate);
    }
    multiply({place.count,
              d,
              place.rows,
              {g, cuts.stride, true},
              x,
              layer_.weight.dtype,
              to.data,
              to.stride,
              to.dtype,
              to.accumulate});
  }

  // A gradient in the weights' own type comes from one product; one of several chunks is summed first.
  bool direct(const AnyMatrix& grad_weight) const {
    return grad_weight.dtype == kReal || (grad_weight.dtype == layer_.weight.dtype && layer_.hidden.rows <= cuts.chunk);
  }

  void finish() const {
    if (grad_hidden_.data != wanted_.data) convert_matrix(device_, grad_hidden_, wanted_);
  }

  Cut cuts;

 private:
  static constexpr Dtype kReal = DtypeOf<Real>::value;

  Operand hidden(i64 row) const { return {factors_.hidden(row), factors_.hidden_stride(), false}; }
  Operand weight(i64 first, bool transposed) const {
    return {factors_.weight(first), layer_.weight.stride, transposed};
  }

  // Whether the product with this factor, of m rows, is to leave out what the filter has.
  bool filters(const Operand& factor, i64 m) const {
    return flags_ &&
           filtered_product_fits(device_, layer_.weight.dtype, factor.data, factor.stride, m, layer_.weight.cols);
  }
  FilteredTile<W> filtered(const TilePlace& place, const W* g) const {
    return {g, cuts.stride, place.rows, place.count, flags_, flag_stride()};
  }
  i64 flag_stride() const { return ceil_div(cuts.stride, kFlagColumns); }

  void multiply(Product p) const {
    p.tf32 = layer_.tf32;
    blas_->multiply(p);
  }

  const DenseLayer& layer_;
  const Device& device_;
  Factors<W> factors_;
  char* workspace_ = nullptr;
  std::optional<Cublas> blas_;
  AnyMatrix grad_hidden_, wanted_;
  unsigned char* flags_ = nullptr;
  float filter_eps_ = 0;
  i64* filtered_ = nullptr;
};

// Calls f with the call, its memory laid out.
template <template <class> class Call, class Args, class F>
void with_call(const Args& args, Scratch& scratch, F f) {
  by_float_type(args.layer.weight.dtype, [&](auto w) {
    using Head = DenseProducts<decltype(w)>;
    Head head(args.layer, args.device, scratch);
    Call<Head> call(args, head, scratch);
    f(call);
  });
}

}  // namespace

void dense_forward(const DenseForward& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  if (fused_fits(args.layer, args.target, args.loss, nullptr, args.device)) return fused_forward(args, scratch);
  with_call<ForwardCall>(args, scratch, [](auto& call) { call.run(); });
}

void dense_backward(const DenseBackward& args) {
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  if (fused_fits(args.layer, args.target, args.loss, args.update, args.device)) return fused_backward(args, scratch);
  with_call<BackwardCall>(args, scratch, [](auto& call) { call.run(); });
}

std::int64_t scratch_bytes(const DenseForward& args) {
  Scratch scratch;
  if (fused_fits(args.layer, args.target, args.loss, nullptr, args.device)) {
    fused_forward(args, scratch);
  } else {
    with_call<ForwardCall>(args, scratch, [](auto&) {});
  }
  return scratch.used();
}

std::int64_t scratch_bytes(const DenseBackward& args) {
  Scratch scratch;
  if (fused_fits(args.layer, args.target, args.loss, args.update, args.device)) {
    fused_backward(args, scratch);
  } else {
    with_call<BackwardCall>(args, scratch, [](auto&) {});
  }
  return scratch.used();
}

}  // namespace widehead::cuda
