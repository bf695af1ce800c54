// workspace.cc -- per-thread scratch; what is larger than kKeep is given back when the next call needs less
#include "cpu/workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <string>

#include "widehead/error.h"

namespace widehead::cpu {
namespace {

constexpr std::size_t kKeep = std::size_t{64} << 20;
constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

// Large scratch is walked at random by the sparse head: pages of 2 MiB spare it most misses of the address cache.
void* allocate(std::size_t size, std::size_t page) {
  void* data = std::aligned_alloc(page, size);
#if defined(MADV_HUGEPAGE)
  if (data && page == kHugePage) madvise(data, size, MADV_HUGEPAGE);  // advice: without it things work all the same
#endif
  return data;
}

}  // namespace

void* workspace(Slot slot, std::size_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& b = buffers[static_cast<int>(slot)];
  if (b.size < bytes || (b.size > kKeep && bytes <= kKeep)) {
    std::free(b.data);
    const std::size_t page = bytes < 2 * kHugePage ? kPage : kHugePage;
    b.size = (bytes + page) / page * page;
    b.data = allocate(b.size, page);
    if (!b.data) {
      b.size = 0;
      throw CapacityError("scratch memory: asked the system for " + std::to_string(bytes) + " bytes and got none");
    }
  }
  return b.data;
}

}  // namespace widehead::cpu
