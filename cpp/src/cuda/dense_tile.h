// dense_tile.h -- what is done to a tile of logits Z [rows, count] that cuBLAS has just left in the L2 cache
#pragma once
#include "cuda/dense_rows.h"

namespace widehead::cuda {

// Where the tile stands: examples [row, row + rows), classes [first, first + count). Z and G have `stride` columns,
// a multiple of kTileAlign, so that 16-byte accesses stay in bounds.
struct TilePlace {
  i64 row, rows, first, count, stride;
};
constexpr i64 kTileAlign = 8;

// One warp sums `piece` classes of one example: sums [batch, slots], slots = ceil(tile / piece).
struct Pieces {
  int slots;
  i64 piece;
};

// Adds the tile's share to the sums. W: the type of the weights, which decides how exact the exponentials are.
template <class W, class Real>
void accumulate_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                     const Pieces& pieces, const RowTargets* rows, const Real* z, RowSums<Real>* sums);

// A block's patch of a tile. The gradient filter looks at the 128 columns of a warp as a whole.
constexpr int kPatchRows = 32, kPatchColumns = 512;

template <class W, class Real>
struct GradientTask {
  const RowTargets* rows;
  const RowGradient<Real>* gradients;
  const Real* z;
  W* g;
  Real* column_sums;     // [row blocks of the tile, stride] or null: sums of G over each patch's examples
  unsigned char* flags;  // or null: see filtered_product.h
  i64 flag_stride;
  const float* largest;  // of |grad_losses|, for the filter
  float filter_eps;      // 0: off
  i64* filtered;         // or null
  const std::int32_t* refused;
};

// G = dL/dZ in the weights' type; zeros where the call is refused or a part is filtered out.
template <class W, class Real>
void gradient_tile(const Device& device, Loss loss, const Problem<Real>& problem, const TilePlace& place,
                   const GradientTask<W, Real>& task);

}  // namespace widehead::cuda
