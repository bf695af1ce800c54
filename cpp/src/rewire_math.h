// rewire_math.h -- strengths and random draws of the connections of a sparse layer, for the CPU and the GPU
#pragma once
#include <cmath>
#include <cstdint>

#include "widehead/random.h"

namespace widehead {

// Of a NaN: it comes last, and so a connection that has it stays.
constexpr std::uint32_t kStrongest = 0x7FC00000u;

// The mean sum / n as the bits of a float32, which are ordered as the numbers are.
WIDEHEAD_HD inline std::uint32_t strength_bits(double sum, std::int64_t n) {
  const auto mean = static_cast<float>(sum / static_cast<double>(n));
  return mean != mean ? kStrongest : float_bits(mean);
}

// How many of so many connections a fraction is.
inline std::int64_t fraction_of(double fraction, std::int64_t connections) {
  return static_cast<std::int64_t>(std::llround(fraction * static_cast<double>(connections)));
}

// n distinct numbers below `population`, uniform among all such sets, in n draws whatever n / population is: for j = 0,
// 1, ... take draw(j), or top(j) where draw(j) is taken already. (Floyd's algorithm: Bentley & Floyd, CACM 1987.)
struct Floyd {
  RandomStream random;
  std::uint64_t row;
  std::int64_t n;
  std::int64_t population;

  WIDEHEAD_HD std::int64_t top(std::int64_t j) const { return population - n + j; }
  WIDEHEAD_HD std::int64_t draw(std::int64_t j) const {
    return static_cast<std::int64_t>(
        random.below(static_cast<std::uint64_t>(top(j)) + 1, row, static_cast<std::uint32_t>(j)));
  }
};

// How many of the n ascending numbers are below x.
template <class T>
WIDEHEAD_HD inline std::int64_t count_below(const T* ascending, std::int64_t n, std::int64_t x) {
  std::int64_t low = 0, high = n;
  while (low < high) {
    const std::int64_t mid = (low + high) / 2;
    if (ascending[mid] < x) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low;
}

// The number that has `rank` free ones below it, where the n ascending numbers `taken` are not free: taken[i] - i free
// ones lie below taken[i].
template <class T>
WIDEHEAD_HD inline std::int64_t free_number(const T* taken, std::int64_t n, std::int64_t rank) {
  std::int64_t low = 0, high = n;
  while (low < high) {
    const std::int64_t mid = (low + high) / 2;
    if (taken[mid] - mid <= rank) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return rank + low;
}

}  // namespace widehead
