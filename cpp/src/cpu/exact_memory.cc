// exact_memory.cc -- blocks by size classes of powers of two and one and a half times them
#include "cpu/exact_memory.h"

#include <array>
#include <bit>
#include <mutex>
#include <vector>

namespace widehead::cpu {
namespace {

constexpr std::size_t kSmallest = std::size_t{1} << 14;  // below it the C library keeps them itself
constexpr std::size_t kLargest = std::size_t{1} << 26;
constexpr std::size_t kKept = std::size_t{1} << 27;  // of all that wait
constexpr std::align_val_t kAlign{64};

struct Size {
  std::size_t bytes;
  int at;
};

Size size_of(std::size_t bytes) {
  const int bits = std::bit_width(bytes - 1);
  const std::size_t whole = std::size_t{1} << bits, less = whole / 4 * 3;
  return bytes <= less ? Size{less, 2 * bits} : Size{whole, 2 * bits + 1};
}

struct Waiting {
  std::mutex lock;
  std::array<std::vector<void*>, 2 * 64 + 2> blocks;
  std::size_t kept = 0;
};

// Never destroyed: heads may outlive what is destroyed at exit.
Waiting& waiting() {
  static auto* all = new Waiting;
  return *all;
}

}  // namespace

void* take_block(std::size_t bytes) {
  if (bytes < kSmallest || bytes > kLargest) return ::operator new(bytes, kAlign);
  const Size size = size_of(bytes);
  {
    Waiting& all = waiting();
    const std::lock_guard guard(all.lock);
    auto& blocks = all.blocks[static_cast<std::size_t>(size.at)];
    if (!blocks.empty()) {
      void* block = blocks.back();
      blocks.pop_back();
      all.kept -= size.bytes;
      return block;
    }
  }
  return ::operator new(size.bytes, kAlign);
}

void give_block(void* block, std::size_t bytes) noexcept {
  if (bytes >= kSmallest && bytes <= kLargest) {
    const Size size = size_of(bytes);
    Waiting& all = waiting();
    const std::lock_guard guard(all.lock);
    if (all.kept + size.bytes <= kKept) {
      try {
        all.blocks[static_cast<std::size_t>(size.at)].push_back(block);
        all.kept += size.bytes;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
  }
  ::operator delete(block, kAlign);
}

}  // namespace widehead::cpu
