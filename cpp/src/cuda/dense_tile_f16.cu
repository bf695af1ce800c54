// dense_tile_f16.cu -- the kernels on a tile of logits for float16 weights
#include "cuda/dense_tile-inl.h"

namespace widehead::cuda {

template void accumulate_tile<f16, float>(const Device&, Loss, const Problem<float>&, const TilePlace&, const Pieces&,
                                          const RowTargets*, const float*, RowSums<float>*);
template void gradient_tile<f16, float>(const Device&, Loss, const Problem<float>&, const TilePlace&,
                                        const GradientTask<f16, float>&);

}  // namespace widehead::cuda
