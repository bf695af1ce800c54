// cuda.cc -- the public face of the CUDA backend's switches
#include "widehead/cuda.h"

#include "cuda/backend.h"

namespace widehead {

bool cuda_built() { return cuda::built(); }

void set_cublas_path(const std::string& path) { cuda::set_cublas_path(path); }

}  // namespace widehead
