// launch.h -- kernels on the caller's device and stream, and the caller's scratch memory cut into pieces
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cuda/check.h"
#include "widehead/error.h"
#include "widehead/view.h"

namespace widehead::cuda {

using i64 = std::int64_t;

// What the sizes of tiles and grids follow from; read once a device.
struct Hardware {
  int processors = 0;
  int l2_bytes = 0;
  int shared_bytes = 0;  // that a block may ask for
  int capability = 0;    // 90 for 9.0
};
const Hardware& hardware(int device);

// Makes the device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

__host__ __device__ constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
__host__ __device__ constexpr i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr i64 at_most(i64 a, i64 b) { return a < b ? a : b; }
__host__ __device__ constexpr i64 at_least(i64 a, i64 b) { return a > b ? a : b; }

// Enough blocks for n items at `each` a block. Kernels stride over the grid, so a cap only makes the threads work longer.
inline unsigned blocks_for(i64 n, i64 each, i64 cap = 1 << 16) {
  return static_cast<unsigned>(at_least(1, at_most(ceil_div(n, each), cap)));
}

template <class... Expected, class... Given>
void launch(const Device& device, dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Expected...),
            Given&&... given) {
  if (shared_bytes > (std::size_t{48} << 10))
    WIDEHEAD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(device.stream);
  WIDEHEAD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(std::forward<Given>(given))...));
}

// Cuts scratch memory into aligned pieces. Without memory it only counts, so one function both sizes and carves.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(const Device& device)
      : base_(static_cast<char*>(device.scratch)), size_(device.scratch_bytes), real_(true) {
    if (reinterpret_cast<std::uintptr_t>(base_) % kAlignment)
      throw CapacityError("device.scratch: expected memory aligned to " + std::to_string(kAlignment) + " bytes");
  }

  template <class T>
  T* take(i64 n) {
    const i64 at = used_;
    used_ += round_up(n * static_cast<i64>(sizeof(T)), kAlignment);
    if (!real_) return nullptr;
    if (used_ > size_)
      throw CapacityError("device.scratch: expected at least " + std::to_string(used_) + " bytes, got " +
                          std::to_string(size_));
    return reinterpret_cast<T*>(base_ + at);
  }
  i64 used() const { return used_; }
  // False where it only counts.
  bool real() const { return real_; }

 private:
  static constexpr int kAlignment = 256;

  char* base_ = nullptr;
  i64 size_ = 0, used_ = 0;
  bool real_ = false;
};

}  // namespace widehead::cuda
