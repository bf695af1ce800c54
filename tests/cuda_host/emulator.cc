// emulator.cc -- fibers, barriers and warp operations of the host emulation of CUDA
#include "emulator.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the emulation switches stacks by hand and knows x86-64 only"
#endif

// Saves the callee-saved registers and the stack pointer, takes the other's.
extern "C" void widehead_switch_stack(void** save, void* load);
asm(R"(
.text
.globl widehead_switch_stack
widehead_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.section .note.GNU-stack,"",@progbits
.text
)");

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t kStack = 128 << 10;
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, valid;
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  void* sp = nullptr;
  dim3 thread;
  int index = 0;
  bool done = false;
  // What it waits for: a barrier or warp generation that has not come yet.
  const unsigned* watched = nullptr;
  unsigned seen = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Warp {
  unsigned generation = 0;
  int arrived = 0, live = 0;
  unsigned char slots[2][kWarp * kSlot];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned generation = 0;
  int arrived = 0, live = 0, threads = 0, flags = 0, flags_result = 0;
  std::vector<unsigned char> shared;
  const std::function<void()>* kernel = nullptr;
  Fiber* current = nullptr;
  void* scheduler_sp = nullptr;
};

thread_local Block block;
thread_local unsigned launches = 0;

// So that the backend finds a cuBLAS that the process has already, as it does beside PyTorch.
const void* const fake_cublas = dlopen(WIDEHEAD_FAKE_CUBLAS, RTLD_NOW | RTLD_LOCAL);

void yield() { widehead_switch_stack(&block.current->sp, block.scheduler_sp); }

void wait_for(const unsigned& generation, unsigned seen) {
  while (generation == seen) {
    block.current->watched = &generation;
    block.current->seen = seen;
    yield();
  }
  block.current->watched = nullptr;
}

void fiber_main() {
  Fiber* self = block.current;
  (*block.kernel)();
  for (auto& group : self->groups)
    if (!group.empty()) die("a thread ended with asynchronous copies that it never waited for");
  if (!self->open.empty()) die("a thread ended with asynchronous copies that it never committed");
  self->done = true;
  --block.live;
  --block.warps[static_cast<std::size_t>(self->index / kWarp)].live;
  yield();
  die("a finished fiber ran");
}

void prepare(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  // The fiber that had this stack never returned from its first function.
  __asan_unpoison_memory_region(f.stack.get(), kStack);
#endif
  auto top = reinterpret_cast<std::uintptr_t>(f.stack.get() + kStack) & ~std::uintptr_t{15};
  auto** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // a return address that is never used keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.sp = sp;
  f.done = false;
  f.watched = nullptr;
  f.groups.clear();
  f.open.clear();
}

void resume(Fiber& f) {
  block.current = &f;
  threadIdx = f.thread;
  widehead_switch_stack(&block.scheduler_sp, f.sp);
}

int order(int i, int n, unsigned turn) {
  switch (turn % 3) {
    case 0: return i;
    case 1: return n - 1 - i;
    default: return static_cast<int>((static_cast<unsigned>(i) * 7919u + turn) % static_cast<unsigned>(n));
  }
}

void run_block(dim3 dims, dim3 index) {
  const int n = block.threads;
  blockIdx = index;
  block.live = n;
  block.arrived = block.flags = 0;
  for (int w = 0; w < static_cast<int>(block.warps.size()); ++w)
    block.warps[static_cast<std::size_t>(w)].live = n - w * kWarp < kWarp ? n - w * kWarp : kWarp;
  for (Warp& w : block.warps) w.arrived = 0;
  std::memset(block.shared.data(), 0xFF, block.shared.size());
  for (int i = 0; i < n; ++i) {
    Fiber& f = *block.fibers[static_cast<std::size_t>(i)];
    prepare(f);
    f.index = i;
    const auto u = static_cast<unsigned>(i);
    f.thread = dim3(u % dims.x, u / dims.x % dims.y, u / dims.x / dims.y);
  }
  // 7919 is prime, so the third order is a permutation unless the block has a multiple of 7919 threads.
  while (block.live > 0) {
    bool progress = false;
    for (int i = 0; i < n; ++i) {
      Fiber& f = *block.fibers[static_cast<std::size_t>(order(i, n, launches))];
      if (f.done || (f.watched && *f.watched == f.seen)) continue;
      resume(f);
      progress = true;
    }
    if (!progress) die("deadlock: a barrier or a warp operation that not all threads reach");
  }
}

}  // namespace

void die(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u %u %u, thread %u %u %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

void run(dim3 grid, dim3 dims, std::size_t shared_bytes, const std::function<void()>& kernel) {
  ++launches;
  const unsigned n = dims.x * dims.y * dims.z;
  if (n == 0 || n > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    die("launch with an invalid grid or block");
  if (shared_bytes > (std::size_t{227} << 10)) die("launch with more shared memory than a block can have");
  block.threads = static_cast<int>(n);
  while (block.fibers.size() < n) block.fibers.push_back(std::make_unique<Fiber>());
  block.warps.resize((n + kWarp - 1) / kWarp);
  block.shared.resize(shared_bytes + 128);
  block.kernel = &kernel;
  gridDim = grid;
  blockDim = dims;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(dims, dim3(x, y, z));
}

unsigned char* shared_memory() {
  const auto at = reinterpret_cast<std::uintptr_t>(block.shared.data());
  return reinterpret_cast<unsigned char*>((at + 127) & ~std::uintptr_t{127});
}

int lane() { return block.current->index % kWarp; }

int barrier(bool flag) {
  if (block.live != block.threads) die("a barrier after some threads of the block have ended");
  const unsigned seen = block.generation;
  block.flags += flag;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    block.flags_result = block.flags;
    block.flags = 0;
    ++block.generation;
  } else {
    wait_for(block.generation, seen);
  }
  return block.flags_result;
}

const unsigned char* exchange(const void* mine, std::size_t bytes) {
  if (bytes > kSlot) die("a warp operation on more bytes than a slot has");
  Warp& warp = block.warps[static_cast<std::size_t>(block.current->index / kWarp)];
  const int lanes = block.threads - block.current->index / kWarp * kWarp;
  if (lanes < kWarp || warp.live != kWarp) die("a warp operation in a warp that is not whole");
  const unsigned seen = warp.generation;
  unsigned char* slots = warp.slots[seen & 1];
  std::memcpy(slots + static_cast<std::size_t>(lane()) * kSlot, mine, bytes);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for(warp.generation, seen);
  }
  return slots;
}

void copy_async(void* to, const void* from, std::size_t bytes, std::size_t valid) {
  block.current->open.push_back({to, from, bytes, valid});
}

void copy_commit() {
  block.current->groups.push_back(std::move(block.current->open));
  block.current->open.clear();
}

void copy_wait(int pending_groups) {
  auto& groups = block.current->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, c.valid);
      std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    groups.pop_front();
  }
}

}  // namespace emulator
