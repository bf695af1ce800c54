// dense_fused_bf16.cu -- the kernels of the narrow dense head for bfloat16 weights
#include "cuda/dense_fused-inl.h"

namespace widehead::cuda {

template void fused_sums<bf16>(const Device&, const FusedProblem<bf16>&, int, RowSums<float>*);
template void fused_grad_hidden<bf16>(const Device&, const FusedProblem<bf16>&, const FusedRow*, int,
                                      const FusedFilter&, float*);
template void fused_grad_weight<bf16>(const Device&, const FusedProblem<bf16>&, const FusedRow*, const FusedFilter&,
                                      const FusedWeightTask&);

}  // namespace widehead::cuda
