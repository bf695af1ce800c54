// emulator.h -- runs CUDA kernels on the host, thread by thread, so that their logic is tested where there is no GPU
//
// Every thread of a block is a fiber with a stack of its own. Fibers switch only at barriers and warp operations, in an
// order that changes from launch to launch: a missing barrier shows as a wrong result. Barriers and warp operations
// that not all threads reach end the program. Shared memory begins as NaN. Launches run at once; streams do nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;

// Of the fiber that runs now.
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

unsigned char* shared_memory();
int lane();
// Waits for all threads of the block; returns how many of them came with `flag`.
int barrier(bool flag);
// Waits for all lanes of the warp; each brings `bytes` bytes and gets a pointer to what lane 0 brought, the others'
// following at a distance of kSlot bytes. Valid until the calling lane's next warp operation but one.
constexpr std::size_t kSlot = 64;
const unsigned char* exchange(const void* mine, std::size_t bytes);

// Copies that count as done only when waited for.
void copy_async(void* to, const void* from, std::size_t bytes, std::size_t valid);
void copy_commit();
void copy_wait(int pending_groups);

[[noreturn]] void die(const char* why);

}  // namespace emulator
