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

}  // namespace widehead::cuda
