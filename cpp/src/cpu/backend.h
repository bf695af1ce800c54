// backend.h -- entries of the CPU backend; the arguments have been checked by the caller
#pragma once
#include "widehead/dense.h"
#include "widehead/hashed.h"
#include "widehead/sparse.h"

namespace widehead::cpu {

void dense_forward(const DenseForward& args);
void dense_backward(const DenseBackward& args);
void dense_logits(const DenseLogits& args);
void dense_scores(const DenseScores& args);
void dense_topk(const DenseTopK& args);
std::shared_ptr<HashedBatch> hashed_forward(const HashedForward& args);
void hashed_backward(const HashedBackward& args);
void sparse_forward(const SparseForward& args);
void sparse_backward(const SparseBackward& args);
void sparse_logits(const SparseLogits& args);
void sparse_scores(const SparseScores& args);
void sparse_topk(const SparseTopK& args);

}  // namespace widehead::cpu
