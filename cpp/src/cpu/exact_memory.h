// exact_memory.h -- memory of the exact head's matrices, used again from step to step
#pragma once
#include <cstddef>
#include <new>
#include <utility>

namespace widehead::cpu {

// The same few sizes come and go every step. Given back to the system, their pages would have to be zeroed by it each time, which
// costs as much as a product. So blocks of some size wait here for the next of their size, up to a bound. Threads may share them.
void* take_block(std::size_t bytes);
void give_block(void* block, std::size_t bytes) noexcept;

// Of a vector that is resized to be written to: new elements are not zeros.
template <class T>
struct BlockAllocator {
  using value_type = T;
  BlockAllocator() = default;
  template <class U>
  BlockAllocator(const BlockAllocator<U>&) {}

  T* allocate(std::size_t n) { return static_cast<T*>(take_block(n * sizeof(T))); }
  void deallocate(T* p, std::size_t n) noexcept { give_block(p, n * sizeof(T)); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
  bool operator==(const BlockAllocator&) const { return true; }
};

}  // namespace widehead::cpu
