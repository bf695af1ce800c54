// intrinsics.h -- what only a GPU can do, done on the host: stands in for cpp/src/cuda/intrinsics.h in the emulation
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "widehead/random.h"
#include "widehead/view.h"

namespace widehead::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_sigmoid(float x) { return 1 / (1 + fast_exp2(x * -1.4426950408889634f)); }

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) { return bf16_float(x.bits); }
inline float to_float(f16 x) { return f16_float(x.bits); }
template <class T, class Real>
T from_float(Real x) {
  if constexpr (sizeof(T) == 2) {
    T out;
    if constexpr (std::is_same_v<T, bf16>) {
      out.bits = bf16_nearest(static_cast<float>(x));
    } else {
      out.bits = f16_nearest(static_cast<float>(x));
    }
    return out;
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
std::uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
float half_of(std::uint32_t pair, int which) {
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * which));
  return to_float(T{bits});
}

// D = A B + C on 16 x 8 x 16, A row-major, B column-major.
template <class T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Mine {
    std::uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* slots = emulator::exchange(&mine, sizeof mine);
  const auto of = [&](int lane) {
    Mine m;
    std::memcpy(&m, slots + static_cast<std::size_t>(lane) * emulator::kSlot, sizeof m);
    return m;
  };
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), col = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const float x = half_of<T>(of(row % 8 * 4 + k % 8 / 2).a[(row >= 8) + 2 * (k >= 8)], k % 2);
      const float y = half_of<T>(of(col * 4 + k % 8 / 2).b[k >= 8], k % 2);
      sum += x * y;
    }
    d[i] += sum;
  }
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r brings the address of row r of matrix i.
template <bool kTransposed>
void ldmatrix4(std::uint32_t (&r)[4], const void* row) {
  const unsigned char* slots = emulator::exchange(&row, sizeof row);
  const int lane = emulator::lane();
  const auto at = [&](int matrix, int i, int j) {
    const std::uint16_t* p;
    std::memcpy(&p, slots + static_cast<std::size_t>(matrix * 8 + i) * emulator::kSlot, sizeof p);
    if (reinterpret_cast<std::uintptr_t>(p) % 16) emulator::die("ldmatrix: a row that is not aligned to 16 bytes");
    return static_cast<std::uint32_t>(p[j]);
  };
  for (int m = 0; m < 4; ++m) {
    const int i = lane / 4, j = lane % 4 * 2;
    r[m] = kTransposed ? at(m, j, i) | at(m, j + 1, i) << 16 : at(m, i, j) | at(m, i, j + 1) << 16;
  }
}

// 16 bytes to shared memory without passing through registers; what lies past `valid` bytes becomes zero.
inline void copy_async16(void* shared, const void* global, int valid = 16) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 != 0; };
  if (misaligned(shared) || misaligned(global)) emulator::die("copy_async16: an address that is not aligned");
  emulator::copy_async(shared, global, 16, static_cast<std::size_t>(valid));
}
inline void copy_commit() { emulator::copy_commit(); }
template <int kPending>
void copy_wait() {
  emulator::copy_wait(kPending);
}

}  // namespace widehead::cuda
