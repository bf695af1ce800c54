// dense.cu -- the dense head on CUDA
#include "cuda/backend.h"
#include "widehead/error.h"
namespace widehead::cuda {
void dense_forward(const DenseForward&) { throw BackendError("to do"); }
void dense_backward(const DenseBackward&) { throw BackendError("to do"); }
std::int64_t scratch_bytes(const DenseForward&) { throw BackendError("to do"); }
std::int64_t scratch_bytes(const DenseBackward&) { throw BackendError("to do"); }
}  // namespace widehead::cuda
