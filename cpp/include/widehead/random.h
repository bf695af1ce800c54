// random.h -- counter-based random numbers (Philox 4x32-10), the same on the CPU, the GPU and every shard
//
// A number is a pure function of (seed, purpose, step, row, block): nothing is stored, any part can be drawn alone.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define WIDEHEAD_HD __host__ __device__
#else
// Always inlined: a copy compiled for one instruction set must not serve units compiled for another.
#define WIDEHEAD_HD [[gnu::always_inline]]
#endif

namespace widehead {

enum class Purpose : std::uint32_t {
  init_weight = 1,
  rounding_weight = 2,
  rounding_bias = 3,
  negatives = 4,
  rewire = 5,
  projection = 6,
  hashing = 7,
  dropout = 8,
  shuffle = 9,
  noise = 10,
  test = 255,
};

struct Philox4 {
  std::uint32_t v[4];
};

WIDEHEAD_HD inline Philox4 philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                  std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One stream of numbers: all draws of one purpose in one step.
struct RandomStream {
  std::uint64_t seed = 0;
  Purpose purpose = Purpose::test;
  std::uint64_t step = 0;

  // Counter = (block, row low, row high, step low); key = seed, with purpose and step high mixed into its halves.
  WIDEHEAD_HD std::uint32_t key0() const {
    return static_cast<std::uint32_t>(seed) ^ (static_cast<std::uint32_t>(purpose) * 0x85EBCA6Bu);
  }
  WIDEHEAD_HD std::uint32_t key1() const {
    return static_cast<std::uint32_t>(seed >> 32) ^ (static_cast<std::uint32_t>(step >> 32) * 0xC2B2AE35u);
  }
  WIDEHEAD_HD Philox4 block(std::uint64_t row, std::uint32_t block_index) const {
    return philox(block_index, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32),
                  static_cast<std::uint32_t>(step), key0(), key1());
  }
  // 16 random bits for column `col` of `row`: eight columns share a block.
  WIDEHEAD_HD std::uint32_t bits16(std::uint64_t row, std::uint64_t col) const {
    const Philox4 r = block(row, static_cast<std::uint32_t>(col >> 3));
    return (r.v[(col & 7) >> 1] >> ((col & 1) * 16)) & 0xFFFFu;
  }
  // Uniform in [0, 1), 24 bits.
  WIDEHEAD_HD float uniform(std::uint64_t row, std::uint32_t index) const {
    const Philox4 r = block(row, index >> 2);
    return static_cast<float>(r.v[index & 3] >> 8) * (1.0f / 16777216.0f);
  }
  // Uniform in {0, ..., n - 1}, by the high half of a 64 x 64 bit product: bias below n / 2^64.
  WIDEHEAD_HD std::uint64_t below(std::uint64_t n, std::uint64_t row, std::uint32_t index) const {
    const Philox4 r = block(row, index >> 1);
    const std::uint64_t x = (static_cast<std::uint64_t>(r.v[(index & 1) * 2 + 1]) << 32) | r.v[(index & 1) * 2];
    const std::uint64_t xl = x & 0xFFFFFFFFu, xh = x >> 32, nl = n & 0xFFFFFFFFu, nh = n >> 32;
    const std::uint64_t mid = xh * nl + ((xl * nl) >> 32);
    const std::uint64_t mid2 = xl * nh + (mid & 0xFFFFFFFFu);
    return xh * nh + (mid >> 32) + (mid2 >> 32);
  }
};

WIDEHEAD_HD inline std::uint32_t float_bits(float x) {
  union {
    float f;
    std::uint32_t u;
  } v;
  v.f = x;
  return v.u;
}
WIDEHEAD_HD inline float bits_float(std::uint32_t u) {
  union {
    std::uint32_t u;
    float f;
  } v;
  v.u = u;
  return v.f;
}

// bfloat16 by rounding to nearest, ties to even; NaN stays NaN.
WIDEHEAD_HD inline std::uint16_t bf16_nearest(float x) {
  const std::uint32_t u = float_bits(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
// bfloat16 by stochastic rounding with 16 random bits: the expectation is x exactly. Infinities and NaN pass.
WIDEHEAD_HD inline std::uint16_t bf16_stochastic(float x, std::uint32_t random16) {
  const std::uint32_t u = float_bits(x);
  if ((u & 0x7F800000u) == 0x7F800000u) return bf16_nearest(x);
  return static_cast<std::uint16_t>((u + random16) >> 16);
}
// IEEE half by stochastic rounding with 16 random bits, of which normal halves use the upper 13: the expectation is x
// exactly. Below 2^-14, where halves are multiples of 2^-24, the odds are multiples of 2^-16: the expectation is x cut to
// a multiple of 2^-40. Beyond the largest half there is nothing to choose between: to nearest.
WIDEHEAD_HD inline std::uint16_t f16_stochastic(float x, std::uint32_t random16) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FE000u)
    return static_cast<std::uint16_t>(sign | (magnitude >= 0x477FF000u ? 0x7C00u : 0x7BFFu));
  if (magnitude < 0x38800000u) {
    const auto steps = static_cast<std::uint32_t>(bits_float(magnitude) * 0x1p40f);
    return static_cast<std::uint16_t>(sign | ((steps + random16) >> 16));
  }
  const std::uint32_t rebased = magnitude - (std::uint32_t{127 - 15} << 23);
  return static_cast<std::uint16_t>(sign | ((rebased + (random16 >> 3)) >> 13));
}
WIDEHEAD_HD inline float bf16_float(std::uint16_t b) { return bits_float(static_cast<std::uint32_t>(b) << 16); }

// IEEE half, round to nearest even.
std::uint16_t f16_nearest(float x);
float f16_float(std::uint16_t h);

}  // namespace widehead
