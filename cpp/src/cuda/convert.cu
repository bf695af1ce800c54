// convert.cu -- a matrix in another floating type
#include "cuda/convert.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;

template <class To>
__global__ void convert_kernel(ConstAnyMatrix from, To* to, i64 stride) {
  const i64 n = from.rows * from.cols, step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const i64 r = i / from.cols, c = i % from.cols;
    to[r * stride + c] = from_float<To>(
        number_at<std::conditional_t<sizeof(To) == 8, double, float>>(from.data, from.dtype, r * from.stride + c));
  }
}

}  // namespace

void convert_matrix(const Device& device, const ConstAnyMatrix& from, const AnyMatrix& to) {
  const dim3 grid(blocks_for(from.rows * from.cols, kThreads));
  switch (to.dtype) {
    case Dtype::f64:
      return launch(device, grid, kThreads, 0, convert_kernel<double>, from, static_cast<double*>(to.data), to.stride);
    case Dtype::bf16:
      return launch(device, grid, kThreads, 0, convert_kernel<bf16>, from, static_cast<bf16*>(to.data), to.stride);
    case Dtype::f16:
      return launch(device, grid, kThreads, 0, convert_kernel<f16>, from, static_cast<f16*>(to.data), to.stride);
    default:
      return launch(device, grid, kThreads, 0, convert_kernel<float>, from, static_cast<float*>(to.data), to.stride);
  }
}

}  // namespace widehead::cuda
