// query.cu -- logits of all classes, and of chosen ones
#include "cuda/backend.h"
#include "widehead/error.h"
namespace widehead::cuda {
void dense_logits(const DenseLogits&) { throw BackendError("to do"); }
void dense_scores(const DenseScores&) { throw BackendError("to do"); }
std::int64_t scratch_bytes(const DenseLogits&) { throw BackendError("to do"); }
std::int64_t scratch_bytes(const DenseScores&) { throw BackendError("to do"); }
}  // namespace widehead::cuda
