// backend.h -- entries of the CPU backend; the arguments have been checked by the caller
#pragma once
#include "widehead/dense.h"

namespace widehead::cpu {

void dense_forward(const DenseForward& args);
void dense_backward(const DenseBackward& args);
void dense_logits(const DenseLogits& args);
void dense_scores(const DenseScores& args);
void dense_topk(const DenseTopK& args);

}  // namespace widehead::cpu
