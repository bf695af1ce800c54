// dense_tile_f64.cu -- the kernels on a tile of logits for float64 weights
#include "cuda/dense_tile-inl.h"

namespace widehead::cuda {

template void accumulate_tile<double, double>(const Device&, Loss, const Problem<double>&, const TilePlace&,
                                              const Pieces&, const RowTargets*, const double*, RowSums<double>*);
template void gradient_tile<double, double>(const Device&, Loss, const Problem<double>&, const TilePlace&,
                                            const GradientTask<double, double>&);

}  // namespace widehead::cuda
