// check.h -- errors of the CUDA runtime as exceptions
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "widehead/error.h"

namespace widehead::cuda {

// `call` as it stands in the source; of it the function's name is told.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  std::string text = call;
  text = text.substr(0, text.find('(')) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    text +=
        "; this build of widehead has no code for this GPU: rebuild with its compute capability in CUDAARCHS, e.g. "
        "CUDAARCHS=80-real for 8.0, or CUDAARCHS=release for all";
  throw BackendError(text);
}

}  // namespace widehead::cuda

#define WIDEHEAD_CUDA_CHECK(call) ::widehead::cuda::check((call), #call)
