// backend.h -- entries of the CUDA backend; the arguments have been checked by the caller
#pragma once
#include <string>

#include "widehead/dense.h"
#include "widehead/exact_device.h"
#include "widehead/ranges.h"
#include "widehead/rewire.h"
#include "widehead/rows.h"
#include "widehead/sampling.h"
#include "widehead/sparse.h"

namespace widehead::cuda {

bool built();
void dense_forward(const DenseForward& args);
void dense_backward(const DenseBackward& args);
void dense_logits(const DenseLogits& args);
void dense_scores(const DenseScores& args);
void dense_topk(const DenseTopK& args);
std::int64_t scratch_bytes(const DenseForward& args);
std::int64_t scratch_bytes(const DenseBackward& args);
std::int64_t scratch_bytes(const DenseLogits& args);
std::int64_t scratch_bytes(const DenseScores& args);
std::int64_t scratch_bytes(const DenseTopK& args);
void join_softmax(const JoinSoftmax& args);
std::int64_t scratch_bytes(const JoinSoftmax& args);

void sparse_forward(const SparseForward& args);
void sparse_backward(const SparseBackward& args);
void sparse_logits(const SparseLogits& args);
void sparse_scores(const SparseScores& args);
void sparse_topk(const SparseTopK& args);
std::int64_t scratch_bytes(const SparseForward& args);
std::int64_t scratch_bytes(const SparseBackward& args);
std::int64_t scratch_bytes(const SparseLogits& args);
std::int64_t scratch_bytes(const SparseScores& args);
std::int64_t scratch_bytes(const SparseTopK& args);

void gather_rows(const GatherRows& args);
void update_rows(const UpdateRows& args);
std::int64_t scratch_bytes(const UpdateRows& args);
void sample_classes(const SampleClasses& args);
void init_uniform(const AnyMatrix& out, double low, double high, std::uint64_t seed, std::int64_t first_row,
                  const Device& device);

void rewire(const Rewire& args);
std::int64_t scratch_bytes(const Rewire& args);
void draw_index(void* index, Dtype dtype, std::int64_t stride, std::int64_t groups, std::int64_t fan_in,
                std::int64_t in_features, std::uint64_t seed, std::int64_t first_row, const Device& device);
void check_index(const SparseIndex& index, std::int64_t groups, std::int64_t fan_in, std::int64_t in_features,
                 const Device& device);

std::int64_t exact_state_bytes(const ExactDevice& head);
std::int64_t exact_batch_bytes(const ExactDevice& head, std::int64_t examples, std::int64_t targets);
std::int64_t exact_init_scratch(const ExactDevice& head);
std::int64_t exact_consolidate_scratch(const ExactDevice& head);
void exact_init(const ExactDevice& head);
void exact_forward(const ExactForward& args);
void exact_backward(const ExactBackward& args);
void exact_gradient(const ExactGradient& args);
void exact_step(const ExactDeviceStep& args);
void exact_rows(const ExactRows& args);
void exact_consolidate(const ExactDevice& head);
void exact_gram(const ExactDevice& head, double* squares, double* sums);
void exact_diagnostics(const ExactDevice& head, double* numbers);
void spherical_loss(const SphericalLossDevice& args);
std::int64_t scratch_bytes(const ExactGradient& args);
std::int64_t scratch_bytes(const ExactDeviceStep& args);
std::int64_t scratch_bytes(const ExactRows& args);
std::int64_t scratch_bytes(const SphericalLossDevice& args);

void set_cublas_path(const std::string& path);

}  // namespace widehead::cuda
