// no_cuda.cc -- the CUDA backend when it is not built: every entry throws
#include "cuda/backend.h"
#include "widehead/error.h"

namespace widehead::cuda {
namespace {
[[noreturn]] void refuse() {
  throw BackendError(
      "this build of widehead has no CUDA backend; move the tensors to the CPU, or rebuild with WIDEHEAD_CUDA=ON");
}
}  // namespace

bool built() { return false; }
void dense_forward(const DenseForward&) { refuse(); }
void dense_backward(const DenseBackward&) { refuse(); }
void dense_logits(const DenseLogits&) { refuse(); }
void dense_scores(const DenseScores&) { refuse(); }
void dense_topk(const DenseTopK&) { refuse(); }
std::int64_t scratch_bytes(const DenseForward&) { refuse(); }
std::int64_t scratch_bytes(const DenseBackward&) { refuse(); }
std::int64_t scratch_bytes(const DenseLogits&) { refuse(); }
std::int64_t scratch_bytes(const DenseScores&) { refuse(); }
std::int64_t scratch_bytes(const DenseTopK&) { refuse(); }
void join_softmax(const JoinSoftmax&) { refuse(); }
std::int64_t scratch_bytes(const JoinSoftmax&) { refuse(); }
void sparse_forward(const SparseForward&) { refuse(); }
void sparse_backward(const SparseBackward&) { refuse(); }
void sparse_logits(const SparseLogits&) { refuse(); }
void sparse_scores(const SparseScores&) { refuse(); }
void sparse_topk(const SparseTopK&) { refuse(); }
std::int64_t scratch_bytes(const SparseForward&) { refuse(); }
std::int64_t scratch_bytes(const SparseBackward&) { refuse(); }
std::int64_t scratch_bytes(const SparseLogits&) { refuse(); }
std::int64_t scratch_bytes(const SparseScores&) { refuse(); }
std::int64_t scratch_bytes(const SparseTopK&) { refuse(); }
std::int64_t scratch_bytes(const UpdateRows&) { refuse(); }
void gather_rows(const GatherRows&) { refuse(); }
void update_rows(const UpdateRows&) { refuse(); }
void sample_classes(const SampleClasses&) { refuse(); }
void init_uniform(const AnyMatrix&, double, double, std::uint64_t, std::int64_t, const Device&) { refuse(); }
std::int64_t scratch_bytes(const Rewire&) { refuse(); }
void rewire(const Rewire&) { refuse(); }
void draw_index(void*, Dtype, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint64_t, std::int64_t,
                const Device&) {
  refuse();
}
void check_index(const SparseIndex&, std::int64_t, std::int64_t, std::int64_t, const Device&) { refuse(); }
std::int64_t exact_state_bytes(const ExactDevice&) { refuse(); }
std::int64_t exact_batch_bytes(const ExactDevice&, std::int64_t, std::int64_t) { refuse(); }
std::int64_t exact_init_scratch(const ExactDevice&) { refuse(); }
std::int64_t exact_consolidate_scratch(const ExactDevice&) { refuse(); }
void exact_init(const ExactDevice&) { refuse(); }
void exact_forward(const ExactForward&) { refuse(); }
void exact_backward(const ExactBackward&) { refuse(); }
void exact_gradient(const ExactGradient&) { refuse(); }
void exact_step(const ExactDeviceStep&) { refuse(); }
void exact_rows(const ExactRows&) { refuse(); }
void exact_consolidate(const ExactDevice&) { refuse(); }
void exact_gram(const ExactDevice&, double*, double*) { refuse(); }
void exact_diagnostics(const ExactDevice&, double*) { refuse(); }
void spherical_loss(const SphericalLossDevice&) { refuse(); }
std::int64_t scratch_bytes(const ExactGradient&) { refuse(); }
std::int64_t scratch_bytes(const ExactDeviceStep&) { refuse(); }
std::int64_t scratch_bytes(const ExactRows&) { refuse(); }
std::int64_t scratch_bytes(const SphericalLossDevice&) { refuse(); }
void set_cublas_path(const std::string&) {}  // harmless: there is nothing to find

}  // namespace widehead::cuda
