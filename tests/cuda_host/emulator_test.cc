// emulator_test.cc -- the emulation runs right kernels right, and wrong ones do not get past it
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "check.h"
#include "cuda/intrinsics.h"

namespace {

template <class... Expected, class... Given>
void launch(int blocks, int threads, std::size_t shared, void (*kernel)(Expected...), Given... given) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(given)...);
}

// Whether f ends the program, with a message.
template <class F>
bool dies(F f) {
  const pid_t child = fork();
  if (child == 0) {
    static_cast<void>(std::freopen("/dev/null", "w", stderr));
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

// Every thread reads what its neighbour wrote.
template <bool kBarrier>
__global__ void rotate(int* out) {
  auto* shared = reinterpret_cast<int*>(widehead::cuda::dynamic_shared());
  const unsigned i = threadIdx.x, n = blockDim.x;
  shared[i] = static_cast<int>(i);
  if (kBarrier) __syncthreads();
  out[blockIdx.x * n + i] = shared[(i + 1) % n] + shared[(i + n - 1) % n];
}

bool rotates(void (*kernel)(int*)) {
  std::vector<int> out(3 * 96);
  launch(3, 96, 96 * sizeof(int), kernel, out.data());
  for (int i = 0; i < 3 * 96; ++i)
    if (out[static_cast<std::size_t>(i)] != (i % 96 + 1) % 96 + (i % 96 + 95) % 96) return false;
  return true;
}

TEST(barriers) {
  for (int i = 0; i < 6; ++i) CHECK(rotates(rotate<true>));
}
TEST(a_missing_barrier_shows) {
  for (int i = 0; i < 6; ++i) CHECK(!rotates(rotate<false>));
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void half_a_warp() {
  if (threadIdx.x < 16) __syncwarp();
}
__global__ void copy_unawaited(int* data) { widehead::cuda::copy_async16(widehead::cuda::dynamic_shared(), data); }
TEST(what_not_all_reach_ends_the_program) {
  CHECK(dies([] { launch(1, 64, 0, half_a_barrier); }));
  CHECK(dies([] { launch(1, 32, 0, half_a_warp); }));
  CHECK(dies([] { launch(1, 2048, 0, half_a_warp); }));
  CHECK(dies([] {
    alignas(16) int data[4] = {};
    launch(1, 32, 16, copy_unawaited, &data[0]);
  }));
  CHECK(!dies([] {
    std::vector<int> out(96);
    launch(1, 96, 96 * sizeof(int), rotate<true>, out.data());
  }));
}

// Lane l ends with the sum of the lanes below it.
__global__ void scan(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = lane;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  out[threadIdx.x] = sum + (odd == 0xAAAAAAAAu ? 0 : 1000);
}
TEST(warp_operations) {
  std::vector<int> out(64);
  launch(1, 64, 0, scan, out.data());
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[static_cast<std::size_t>(i)], i % 32 * (i % 32 + 1) / 2);
}

// Asynchronous copies land when they are waited for, oldest group first.
__global__ void copies(int* data, int* out) {
  auto* shared = reinterpret_cast<int*>(widehead::cuda::dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; ++i) shared[i] = -1;
    widehead::cuda::copy_async16(shared, data);
    widehead::cuda::copy_commit();
    widehead::cuda::copy_async16(shared + 4, data + 4, 8);
    widehead::cuda::copy_commit();
    out[0] = shared[0];
    widehead::cuda::copy_wait<1>();
    out[1] = shared[0], out[2] = shared[4];
    widehead::cuda::copy_wait<0>();
    out[3] = shared[5], out[4] = shared[6];
  }
}
TEST(asynchronous_copies) {
  alignas(16) int data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  int out[5];
  launch(1, 32, 32, copies, &data[0], &out[0]);
  CHECK_EQ(out[0], -1);
  CHECK_EQ(out[1], 1);
  CHECK_EQ(out[2], -1);
  CHECK_EQ(out[3], 6);
  CHECK_EQ(out[4], 0);
}

}  // namespace
