// cuda.h -- what a program may want to know of, and tell, the CUDA backend; no CUDA header is needed
#pragma once
#include <string>

namespace widehead {

// Whether this build has the CUDA backend. A device may still be missing.
bool cuda_built();

// The file of cuBLAS, for when neither the process nor the loader has one. Takes effect before the first product.
void set_cublas_path(const std::string& path);

}  // namespace widehead
