// dense_tile_bf16.cu -- the kernels on a tile of logits for bfloat16 weights
#include "cuda/dense_tile-inl.h"

namespace widehead::cuda {

template void accumulate_tile<bf16, float>(const Device&, Loss, const Problem<float>&, const TilePlace&, const Pieces&,
                                           const RowTargets*, const float*, RowSums<float>*);
template void gradient_tile<bf16, float>(const Device&, Loss, const Problem<float>&, const TilePlace&,
                                         const GradientTask<bf16, float>&);

}  // namespace widehead::cuda
