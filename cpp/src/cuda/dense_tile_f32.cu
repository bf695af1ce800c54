// dense_tile_f32.cu -- the kernels on a tile of logits for float32 weights
#include "cuda/dense_tile-inl.h"

namespace widehead::cuda {

template void accumulate_tile<float, float>(const Device&, Loss, const Problem<float>&, const TilePlace&, const Pieces&,
                                            const RowTargets*, const float*, RowSums<float>*);
template void gradient_tile<float, float>(const Device&, Loss, const Problem<float>&, const TilePlace&,
                                          const GradientTask<float, float>&);

}  // namespace widehead::cuda
