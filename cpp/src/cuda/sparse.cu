// sparse.cu -- the sparse head on CUDA: losses, gradients and steps by the walk over tiles, its factors gathered
//
// The logits of a tile go through memory as the dense head's do: one number for every fan_in that are gathered.
#include <type_traits>

#include "cuda/backend.h"
#include "cuda/sparse_groups.h"
#include "cuda/sparse_head.h"
#include "cuda/sparse_products.h"
#include "cuda/tile_driver.h"

namespace widehead::cuda {
namespace {

constexpr i64 kLargestTile = 65536, kSmallestTile = 256;
constexpr i64 kGradientBytes = i64{128} << 20;  // at most, of a tile's dW

// X' of a chunk takes about a quarter of the L2 cache, Z of a tile another, and what is listed of its index an eighth:
// or, of groups, what they give to their inputs a quarter.
Cut cut(const SparseLayer& layer, const Device& device) {
  const Hardware& h = hardware(device.index);
  const i64 size = layer.weight.dtype == Dtype::f64 ? 8 : 4, fan_in = at_least(1, layer.weight.cols);
  const i64 batch = at_least(1, layer.hidden.rows);
  Cut c{};
  const i64 fit = h.l2_bytes / 4 / (size_of(layer.weight.dtype) * at_least(1, layer.hidden.cols));
  const i64 most = at_least(64, fit / 64 * 64);
  c.chunk = batch <= most ? batch : round_up(ceil_div(batch, ceil_div(batch, most)), 64);
  c.tile = at_most(kLargestTile, h.l2_bytes / 4 / size / padded_examples(c.chunk));
  const i64 group = layer.index.group_size;
  const bool grouped = groups_fit(device, layer.weight.dtype, group);
  const i64 listed =
      grouped ? h.l2_bytes / 4 / 4 / padded_examples(c.chunk) / fan_in * group : h.l2_bytes / 8 / 4 / fan_in;
  c.tile = at_most(c.tile, at_most(listed, kGradientBytes / size / fan_in));
  c.tile = at_least(kSmallestTile, c.tile / 128 * 128);
  c.tile = at_most(at_most(c.tile, most_listed_classes(fan_in)), at_least(1, layer.weight.rows));
  if (grouped && c.tile > group) c.tile = c.tile / group * group;
  c.cut_pieces(h);
  return c;
}

template <class Weight>
class SparseProducts {
 public:
  using W = Weight;
  using Real = RealOf<W>;

  SparseProducts(const SparseLayer& layer, const Device& device, Scratch& scratch)
      : cuts(cut(layer, device)), layer_(layer), device_(device), padded_(padded_examples(cuts.chunk)) {
    x_ = scratch.take<W>(chunks() * chunk_size());
  }

  void take_backward(const DenseBackward& args, Scratch& scratch) {
    grad_hidden_ = args.grad_hidden;
    g_ = scratch.take<W>(cuts.tile * padded_);
    if (!grad_hidden_) return;
    dx_ = scratch.take<Real>(chunks() * chunk_size());
    const i64 rows = grouped() ? most_groups(cuts.tile, group_size()) : cuts.tile;
    lists_ = SparseLists(layer_.hidden.cols, rows, layer_.weight.cols, scratch);
    if (grouped()) group_dx_ = scratch.take<Real>(rows * layer_.weight.cols * padded_);
  }

  void begin(const Report* strict) const {
    gather_hidden(device_, layer_.hidden, cuts.chunk, padded_, x_, strict);
    if (!grad_hidden_) return;
    lists_.begin(device_);
    WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(dx_, 0, static_cast<std::size_t>(chunks() * chunk_size()) * sizeof(Real),
                                        static_cast<cudaStream_t>(device_.stream)));
  }

  void logits(const TilePlace& place, Real* z) const {
    gather_logits(device_, weights(), x(place), place.rows, place.first, place.count, z, place.stride);
  }

  void filter(GradientTask<W, Real>&) const {}

  void begin_tile(const TilePlace& place) const {
    if (!grad_hidden_) return;
    if (!grouped()) return lists_.build(device_, weights().inputs, place.first, place.count);
    const TileGroups t(place.first, place.count, group_size());
    lists_.build(device_, rows_of(weights().inputs), t.first_group, t.groups);
  }

  void gradients(const TilePlace& place, const W* g) const {
    turn_gradients(device_, g, place.rows, place.stride, place.count, padded_, g_);
  }

  void add_grad_hidden(const TilePlace& place, const W*) const {
    Real* dx = dx_ + place.row / cuts.chunk * chunk_size();
    if constexpr (sizeof(W) == 2) {
      if (grouped()) {
        group_grad_hidden(device_, weights(), g_, place.first, place.count, group_dx_);
        return gather_rows_of_groups(device_, lists_.view(), group_dx_, padded_, dx);
      }
    }
    gather_grad_hidden(device_, weights(), lists_.view(), g_, place.first, dx);
  }

  void add_grad_weight(const TilePlace& place, const W*, const TileGradient& to) const {
    gather_grad_weight(device_, weights(), x(place), g_, place.first, place.count, static_cast<Real*>(to.data),
                       to.stride, to.accumulate);
  }

  bool direct(const AnyMatrix& grad_weight) const { return grad_weight.dtype == DtypeOf<Real>::value; }

  void finish() const { store_grad_hidden(device_, dx_, cuts.chunk, padded_, grad_hidden_); }

  Cut cuts;

 private:
  i64 chunks() const { return ceil_div(layer_.hidden.rows, cuts.chunk); }
  i64 chunk_size() const { return layer_.hidden.cols * padded_; }
  const W* x(const TilePlace& place) const { return x_ + place.row / cuts.chunk * chunk_size(); }
  i64 group_size() const { return layer_.index.group_size; }
  bool grouped() const { return groups_fit(device_, layer_.weight.dtype, group_size()); }
  SparseWeights<W> weights() const { return weights_of<W>(layer_, {}, padded_); }

  const SparseLayer& layer_;
  const Device& device_;
  i64 padded_;
  W *x_ = nullptr, *g_ = nullptr;
  Real *dx_ = nullptr, *group_dx_ = nullptr;
  AnyMatrix grad_hidden_;
  SparseLists lists_;
};

DenseForward dense_call(const SparseForward& args) {
  DenseForward out;
  out.layer = as_dense(args.layer);
  out.target = args.target;
  out.loss = args.loss;
  out.losses = args.losses;
  out.output = args.output;
  out.lse = args.lse;
  out.device = args.device;
  return out;
}

DenseBackward dense_call(const SparseBackward& args) {
  DenseBackward out;
  out.layer = as_dense(args.layer);
  out.target = args.target;
  out.loss = args.loss;
  out.lse = args.lse;
  out.grad_losses = args.grad_losses;
  out.grad_output = args.grad_output;
  out.grad_lse = args.grad_lse;
  out.grad_hidden = args.grad_hidden;
  out.grad_weight = args.grad_weight;
  out.grad_bias = args.grad_bias;
  out.update = args.update;
  out.losses = args.losses;
  out.output = args.output;
  out.device = args.device;
  return out;
}

// Calls f with the call, its memory laid out.
template <template <class> class Call, class Args, class F>
void with_call(const Args& args, Scratch& scratch, F f) {
  const auto dense = dense_call(args);
  by_sparse_type(args.layer.weight.dtype, [&](auto w) {
    using Head = SparseProducts<decltype(w)>;
    Head head(args.layer, args.device, scratch);
    Call<Head> call(dense, head, scratch);
    f(call);
  });
}

}  // namespace

void sparse_forward(const SparseForward& args) {
  if (args.layer.hidden.rows == 0) return;
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  with_call<ForwardCall>(args, scratch, [](auto& call) { call.run(); });
}

void sparse_backward(const SparseBackward& args) {
  const DeviceGuard guard(args.device);
  Scratch scratch(args.device);
  with_call<BackwardCall>(args, scratch, [](auto& call) { call.run(); });
}

std::int64_t scratch_bytes(const SparseForward& args) {
  Scratch scratch;
  with_call<ForwardCall>(args, scratch, [](auto&) {});
  return scratch.used();
}

std::int64_t scratch_bytes(const SparseBackward& args) {
  Scratch scratch;
  with_call<BackwardCall>(args, scratch, [](auto&) {});
  return scratch.used();
}

}  // namespace widehead::cuda
