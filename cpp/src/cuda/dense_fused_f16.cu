// dense_fused_f16.cu -- the kernels of the narrow dense head for float16 weights
#include "cuda/dense_fused-inl.h"

namespace widehead::cuda {

template void fused_sums<f16>(const Device&, const FusedProblem<f16>&, int, RowSums<float>*);
template void fused_grad_hidden<f16>(const Device&, const FusedProblem<f16>&, const FusedRow*, int, const FusedFilter&,
                                     float*);
template void fused_grad_weight<f16>(const Device&, const FusedProblem<f16>&, const FusedRow*, const FusedFilter&,
                                     const FusedWeightTask&);

}  // namespace widehead::cuda
