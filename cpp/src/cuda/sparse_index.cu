// sparse_index.cu -- the inputs of a sparse layer: drawn, and looked at
#include "cuda/backend.h"
#include "cuda/draw.h"
#include "cuda/fault.h"
#include "cuda/launch.h"

namespace widehead::cuda {
namespace {

constexpr int kThreads = 256;

// A block a row, which it draws and sorts where the row lies: any fan-in will do.
template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_rows(T* index, i64 stride, i64 rows, i64 fan_in, i64 in_features, RandomStream random, i64 first_row) {
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
    draw_ascending(Floyd{random, static_cast<std::uint64_t>(first_row + row), fan_in, in_features},
                   index + row * stride);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    check_rows(const T* index, i64 stride, i64 rows, i64 fan_in, i64 in_features, Report report) {
  for (i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; i < rows * fan_in;
       i += static_cast<i64>(gridDim.x) * kThreads) {
    const i64 row = i / fan_in, k = i % fan_in;
    const T* const at = index + row * stride + k;
    const i64 input = *at;
    if (input < 0 || input >= in_features) {
      report(Fault::index_range, Argument::index, row, input, in_features);
    } else if (k > 0 && static_cast<i64>(at[-1]) >= input) {
      report(Fault::index_order, Argument::index, row, input, at[-1]);
    }
  }
}

template <class T>
void draw_as(T* index, i64 stride, i64 rows, i64 fan_in, i64 in_features, std::uint64_t seed, i64 first_row,
             const Device& device) {
  const auto threads = static_cast<unsigned>(at_most(kThreads, round_up(fan_in, 32)));
  launch(device, blocks_for(rows, 1), threads, 0, draw_rows<T>, index, stride, rows, fan_in, in_features,
         RandomStream{seed, Purpose::rewire, 0}, first_row);
}

template <class T>
void check_as(const T* index, i64 stride, i64 rows, i64 fan_in, i64 in_features, const Device& device) {
  launch(device, blocks_for(rows * fan_in, kThreads), kThreads, 0, check_rows<T>, index, stride, rows, fan_in,
         in_features, Report{device.faults, device.refused});
}

}  // namespace

void draw_index(void* index, Dtype dtype, i64 stride, i64 groups, i64 fan_in, i64 in_features, std::uint64_t seed,
                i64 first_row, const Device& device) {
  const DeviceGuard guard(device);
  if (groups == 0) return;
  if (dtype == Dtype::u16)
    return draw_as(static_cast<std::uint16_t*>(index), stride, groups, fan_in, in_features, seed, first_row, device);
  draw_as(static_cast<std::int32_t*>(index), stride, groups, fan_in, in_features, seed, first_row, device);
}

void check_index(const SparseIndex& index, i64 groups, i64 fan_in, i64 in_features, const Device& device) {
  const DeviceGuard guard(device);
  if (groups == 0 || fan_in == 0) return;
  if (index.dtype == Dtype::u16)
    return check_as(static_cast<const std::uint16_t*>(index.data), index.stride, groups, fan_in, in_features, device);
  check_as(static_cast<const std::int32_t*>(index.data), index.stride, groups, fan_in, in_features, device);
}

}  // namespace widehead::cuda
