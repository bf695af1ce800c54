// workspace.h -- scratch memory that a thread keeps between calls, so that a small step pays no page faults
#pragma once
#include <cstddef>

namespace widehead::cpu {

// A call's own scratch and a task's scratch may be live at once on the calling thread, and either may need a matrix product
// (matmul.h), which holds the third within one of its tasks only.
enum class Slot { call, task, product };

// Memory of at least `bytes`, 64-byte aligned, valid until this thread asks for the same slot again. Contents undefined.
// Throws CapacityError when the system has none.
void* workspace(Slot slot, std::size_t bytes);

// Splits a workspace into aligned arrays; with a null base it only counts, which is how sizes are found.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::size_t n) {
    return static_cast<T*>(bytes(n * sizeof(T)));
  }
  void* bytes(std::size_t n) {
    void* p = base_ ? base_ + used_ : nullptr;
    used_ += (n + 63) / 64 * 64;
    return p;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace widehead::cpu
