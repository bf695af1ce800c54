// scatter_baseline.cu -- a sparse layer the obvious way, for the benchmark to compare with: a thread for each example and
// class, whose K inputs are gathered; both gradients by atomic additions. As the kernels of arXiv 2306.03725 (2023).
//
// Weights, inputs and hidden have any layout that the launchers below name; logits and their gradient are in memory.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

using i64 = std::int64_t;

constexpr int kThreads = 256;

struct Layer {
  const void* hidden;  // [B, H] of the weights' type
  const void* weight;  // [D, K] float32 | bfloat16, as its bits
  const void* index;   // [D, K] uint16 | int32
  const float* bias;   // [D]
  i64 batch, classes, features, fan_in;
};

__device__ inline float number(float x) { return x; }
__device__ inline float number(std::uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

// logits [B, D]
template <class T, class I>
__global__ void __launch_bounds__(kThreads) forward(Layer l, float* logits) {
  const i64 c = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  if (c >= l.classes) return;
  const T* const hidden = static_cast<const T*>(l.hidden) + b * l.features;
  const T* const weight = static_cast<const T*>(l.weight) + c * l.fan_in;
  const I* const index = static_cast<const I*>(l.index) + c * l.fan_in;
  float z = l.bias[c];
  for (i64 k = 0; k < l.fan_in; ++k) z += number(weight[k]) * number(hidden[index[k]]);
  logits[b * l.classes + c] = z;
}

// grad [B, D] of the logits; grad_weight [D, K] and grad_hidden [B, H] are added to.
template <class T, class I>
__global__ void __launch_bounds__(kThreads)
    backward(Layer l, const float* grad, float* grad_weight, float* grad_hidden) {
  const i64 c = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  if (c >= l.classes) return;
  const float g = grad[b * l.classes + c];
  if (g == 0.0f) return;
  const T* const hidden = static_cast<const T*>(l.hidden) + b * l.features;
  const T* const weight = static_cast<const T*>(l.weight) + c * l.fan_in;
  const I* const index = static_cast<const I*>(l.index) + c * l.fan_in;
  for (i64 k = 0; k < l.fan_in; ++k) {
    const i64 input = index[k];
    atomicAdd(grad_weight + c * l.fan_in + k, g * number(hidden[input]));
    atomicAdd(grad_hidden + b * l.features + input, g * number(weight[k]));
  }
}

template <class... Parameters, class... Given>
int start(const Layer& l, void* stream, void (*kernel)(Layer, Parameters...), Given... given) {
  if (l.batch == 0 || l.classes == 0) return 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((l.classes + kThreads - 1) / kThreads), static_cast<unsigned>(l.batch));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, l, given...));
}

}  // namespace

// Each returns a cudaError_t. `half`: weights and hidden are bfloat16; `wide`: inputs are int32.
extern "C" int scatter_forward(int half, int wide, const void* hidden, const void* weight, const void* index,
                               const float* bias, i64 batch, i64 classes, i64 features, i64 fan_in, float* logits,
                               void* stream) {
  const Layer l{hidden, weight, index, bias, batch, classes, features, fan_in};
  if (half && wide) return start(l, stream, forward<std::uint16_t, std::int32_t>, logits);
  if (half) return start(l, stream, forward<std::uint16_t, std::uint16_t>, logits);
  if (wide) return start(l, stream, forward<float, std::int32_t>, logits);
  return start(l, stream, forward<float, std::uint16_t>, logits);
}

extern "C" int scatter_backward(int half, int wide, const void* hidden, const void* weight, const void* index,
                                const float* grad, i64 batch, i64 classes, i64 features, i64 fan_in, float* grad_weight,
                                float* grad_hidden, void* stream) {
  const Layer l{hidden, weight, index, nullptr, batch, classes, features, fan_in};
  if (half && wide) return start(l, stream, backward<std::uint16_t, std::int32_t>, grad, grad_weight, grad_hidden);
  if (half) return start(l, stream, backward<std::uint16_t, std::uint16_t>, grad, grad_weight, grad_hidden);
  if (wide) return start(l, stream, backward<float, std::int32_t>, grad, grad_weight, grad_hidden);
  return start(l, stream, backward<float, std::uint16_t>, grad, grad_weight, grad_hidden);
}
