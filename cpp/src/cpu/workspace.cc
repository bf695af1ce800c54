// workspace.cc -- per-thread scratch; what is larger than kKeep is given back when the next call needs less
#include "cpu/workspace.h"

#include <cstdlib>
#include <string>

#include "widehead/error.h"

namespace widehead::cpu {
namespace {

constexpr std::size_t kKeep = std::size_t{64} << 20;

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* workspace(Slot slot, std::size_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& b = buffers[static_cast<int>(slot)];
  if (b.size < bytes || (b.size > kKeep && bytes <= kKeep)) {
    std::free(b.data);
    b.size = (bytes + 4095) / 4096 * 4096 + 4096;
    b.data = std::aligned_alloc(4096, b.size);
    if (!b.data) {
      b.size = 0;
      throw CapacityError("scratch memory: asked the system for " + std::to_string(bytes) + " bytes and got none");
    }
  }
  return b.data;
}

}  // namespace widehead::cpu
