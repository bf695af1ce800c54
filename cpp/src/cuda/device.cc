// device.cc -- what is known of a device, and which one is current
#include <mutex>
#include <vector>

#include "cuda/backend.h"
#include "cuda/launch.h"

namespace widehead::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  WIDEHEAD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

Hardware read_hardware(int device) {
  Hardware h;
  h.processors = attribute(cudaDevAttrMultiProcessorCount, device);
  h.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  h.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  h.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  return h;
}

// A static runtime imports without a driver; its calls then fail with words that help nobody.
void expect_device(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess)
    throw BackendError(std::string("no usable CUDA device (") + cudaGetErrorString(status) +
                       "); check the driver, or move the tensors to the CPU");
  if (device < 0 || device >= count)
    throw BackendError("device: expected a CUDA device in [0, " + std::to_string(count) + "), got " +
                       std::to_string(device));
}

}  // namespace

bool built() { return true; }

const Hardware& hardware(int device) {
  static std::mutex mutex;
  static std::vector<Hardware> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = static_cast<std::size_t>(device);
  if (device < 0 || at >= known.size() || known[at].processors == 0) {
    expect_device(device);
    if (known.empty()) known.reserve(256);  // references stay good
    if (at >= known.capacity()) throw BackendError("device: expected a CUDA device below 256");
    if (at >= known.size()) known.resize(at + 1);
    known[at] = read_hardware(device);
  }
  return known[at];
}

DeviceGuard::DeviceGuard(const Device& device) {
  hardware(device.index);
  WIDEHEAD_CUDA_CHECK(cudaGetDevice(&before_));
  changed_ = before_ != device.index;
  if (changed_) WIDEHEAD_CUDA_CHECK(cudaSetDevice(device.index));
}

DeviceGuard::~DeviceGuard() {
  if (changed_) static_cast<void>(cudaSetDevice(before_));
}

}  // namespace widehead::cuda
