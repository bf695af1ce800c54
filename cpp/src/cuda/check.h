// check.h -- errors of the CUDA runtime as exceptions
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "widehead/error.h"

namespace widehead::cuda {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw BackendError(std::string(call) + ": " + cudaGetErrorString(status));
}

}  // namespace widehead::cuda

#define WIDEHEAD_CUDA_CHECK(call) ::widehead::cuda::check((call), #call)
