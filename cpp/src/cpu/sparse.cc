// sparse.cc -- the sparse head on the CPU
#include "widehead/sparse.h"

#include "cpu/backend.h"
#include "cpu/driver.h"

namespace widehead::cpu {

void sparse_forward(const SparseForward& args) {
  by_real(args.layer, [&](auto real) { forward_as<decltype(real)>(args, kernels().sparse); });
}

void sparse_backward(const SparseBackward& args) {
  by_real(args.layer, [&](auto real) { Backward<decltype(real), SparseBackward>(args, kernels().sparse).run(); });
}

void sparse_topk(const SparseTopK& args) {
  by_real(args.layer, [&](auto real) { topk_as<decltype(real)>(args, LossOptions{}, kernels().sparse); });
}

void sparse_logits(const SparseLogits& args) { logits_as(args, LossOptions{}, kernels().sparse); }

void sparse_scores(const SparseScores& args) { scores_as(args, LossOptions{}, kernels().sparse); }

}  // namespace widehead::cpu
