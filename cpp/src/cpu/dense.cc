// dense.cc -- the dense head on the CPU
#include "widehead/dense.h"

#include "cpu/backend.h"
#include "cpu/driver.h"

namespace widehead::cpu {
namespace {

LossOptions cap_of(double softcap) {
  LossOptions loss;
  loss.softcap = softcap;
  return loss;
}

}  // namespace

void dense_forward(const DenseForward& args) {
  by_real(args.layer, [&](auto real) { forward_as<decltype(real)>(args, kernels().dense); });
}

void dense_backward(const DenseBackward& args) {
  by_real(args.layer, [&](auto real) { Backward<decltype(real), DenseBackward>(args, kernels().dense).run(); });
}

void dense_topk(const DenseTopK& args) {
  by_real(args.layer, [&](auto real) { topk_as<decltype(real)>(args, cap_of(args.softcap), kernels().dense); });
}

void dense_logits(const DenseLogits& args) { logits_as(args, cap_of(args.softcap), kernels().dense); }

void dense_scores(const DenseScores& args) { scores_as(args, cap_of(args.softcap), kernels().dense); }

}  // namespace widehead::cpu
