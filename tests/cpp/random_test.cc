// random_test.cc -- Philox against its published answers, the distributions drawn from it, and the rounding of bf16 and
// half
#include "widehead/random.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "check.h"

namespace {

using widehead::RandomStream;
using Words = std::array<std::uint32_t, 4>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Words draw(Words c, std::array<std::uint32_t, 2> k) {
  const widehead::Philox4 r = widehead::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
  return {r.v[0], r.v[1], r.v[2], r.v[3]};
}

// The known answers that come with the authors' own implementation.
TEST(philox_known_answers) {
  CHECK((draw({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const std::uint32_t f = 0xffffffff;
  CHECK((draw({f, f, f, f}, {f, f}) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((draw({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
         Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(streams_differ_in_every_part_of_their_key) {
  const RandomStream base{7, widehead::Purpose::test, 3};
  std::vector<RandomStream> streams = {base};
  streams.push_back({8, base.purpose, base.step});
  streams.push_back({base.seed + (std::uint64_t{1} << 32), base.purpose, base.step});
  streams.push_back({base.seed, widehead::Purpose::negatives, base.step});
  streams.push_back({base.seed, base.purpose, 4});
  streams.push_back({base.seed, base.purpose, base.step + (std::uint64_t{1} << 32)});
  std::set<std::uint32_t> first;
  for (const RandomStream& s : streams) {
    for (std::uint64_t row : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 32}) {
      for (std::uint32_t block : {0u, 1u}) first.insert(s.block(row, block).v[0]);
    }
  }
  CHECK_EQ(first.size(), streams.size() * 6);
}

TEST(bits16_are_the_halves_of_the_block) {
  const RandomStream s{11};
  for (std::uint64_t row : {0, 5}) {
    for (std::uint64_t col = 0; col < 40; ++col) {
      const std::uint32_t word = s.block(row, static_cast<std::uint32_t>(col / 8)).v[col % 8 / 2];
      CHECK_EQ(s.bits16(row, col), col % 2 == 0 ? word % 65536 : word / 65536);
    }
  }
}

TEST(uniform_mean_variance_and_range) {
  const RandomStream s{5};
  constexpr int kRows = 400, kCols = 500;
  double sum = 0, squares = 0, lag = 0, before = 0.5;
  float lowest = 1, highest = 0;
  for (int r = 0; r < kRows; ++r) {
    for (std::uint32_t i = 0; i < kCols; ++i) {
      const float u = s.uniform(static_cast<std::uint64_t>(r), i);
      sum += u;
      squares += (u - 0.5) * (u - 0.5);
      lag += (u - 0.5) * (before - 0.5);
      before = u;
      lowest = std::min(lowest, u);
      highest = std::max(highest, u);
    }
  }
  const double n = double(kRows) * kCols;
  // Five standard errors: variance 1/12; that of the squared deviation is 1/180, that of a product of two 1/144.
  CHECK_NEAR(sum / n, 0.5, 5 * std::sqrt(1 / 12.0 / n));
  CHECK_NEAR(squares / n, 1 / 12.0, 5 * std::sqrt(1 / 180.0 / n));
  CHECK_NEAR(lag / n, 0.0, 5 * std::sqrt(1 / 144.0 / n));
  CHECK(lowest >= 0 && lowest < 1e-3f && highest < 1 && highest > 1 - 1e-3f);
}

TEST(below_is_uniform) {
  const RandomStream s{9};
  for (std::uint64_t n : {1, 2, 3, 10, 97}) {
    constexpr int kDraws = 40000;
    std::vector<int> count(n, 0);
    for (std::uint32_t i = 0; i < kDraws; ++i) {
      const std::uint64_t x = s.below(n, i / 7, i % 7);
      CHECK(x < n);
      if (x < n) ++count[x];
    }
    const double p = 1.0 / double(n), error = 5 * std::sqrt(kDraws * p * (1 - p));
    for (int c : count) CHECK_NEAR(c, kDraws * p, error);
  }
}

// The same product in 128 bits, for n past 2^32 too, where the carries of the halves matter.
TEST(below_is_the_high_half_of_the_product) {
  const RandomStream s{10};
  const std::uint64_t big = std::numeric_limits<std::uint64_t>::max();
  for (std::uint64_t n : {std::uint64_t{1}, std::uint64_t{97}, std::uint64_t{1} << 32, (std::uint64_t{1} << 32) + 1,
                          std::uint64_t{1000000007} * 1000003, (std::uint64_t{1} << 63) + 12345, big}) {
    double sum = 0;
    constexpr int kDraws = 4000;
    for (std::uint32_t i = 0; i < kDraws; ++i) {
      const widehead::Philox4 r = s.block(3, i / 2);
      const std::uint64_t x = (std::uint64_t{r.v[i % 2 * 2 + 1]} << 32) | r.v[i % 2 * 2];
      __extension__ using Wide = unsigned __int128;
      const std::uint64_t expected = static_cast<std::uint64_t>((Wide{x} * n) >> 64);
      const std::uint64_t got = s.below(n, 3, i);
      CHECK_EQ(got, expected);
      CHECK(got < n);
      sum += double(got) / double(n);
    }
    if (n > 97) CHECK_NEAR(sum / kDraws, 0.5, 5 * std::sqrt(1 / 12.0 / kDraws));
  }
}

// The nearest of two neighbours, found by comparing distances in double.
std::uint16_t nearest_of(float x, std::uint16_t low, std::uint16_t high, float (*value)(std::uint16_t)) {
  const double below = std::fabs(double(x) - double(value(low))), above = std::fabs(double(value(high)) - double(x));
  if (below != above) return below < above ? low : high;
  return low % 2 == 0 ? low : high;
}

TEST(bf16_is_exact_on_its_own_values) {
  for (std::uint32_t b = 0; b < 65536; ++b) {
    const auto bits = static_cast<std::uint16_t>(b);
    const float x = widehead::bf16_float(bits);
    if (std::isnan(x)) {
      CHECK(std::isnan(widehead::bf16_float(widehead::bf16_nearest(x))));
      CHECK(std::isnan(widehead::bf16_float(widehead::bf16_stochastic(x, 0xFFFF))));
      continue;
    }
    CHECK_EQ(widehead::bf16_nearest(x), bits);
    for (std::uint32_t r : {0x0u, 0x1u, 0x7FFFu, 0x8000u, 0xFFFFu}) CHECK_EQ(widehead::bf16_stochastic(x, r), bits);
  }
}

TEST(bf16_nearest_between_its_values) {
  // Between each two neighbours: next to both ends, both sides of the middle, and the middle itself.
  for (std::uint32_t b = 0; b < 0x7F7F; ++b) {
    for (std::uint32_t part : {0x1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const auto low = static_cast<std::uint16_t>(b), high = static_cast<std::uint16_t>(b + 1);
      const float x = widehead::bits_float((b << 16) | part);
      const std::uint16_t expected = nearest_of(x, low, high, widehead::bf16_float);
      CHECK_EQ(widehead::bf16_nearest(x), expected);
      CHECK_EQ(widehead::bf16_nearest(-x), static_cast<std::uint16_t>(expected | 0x8000));
    }
  }
  const float largest = std::numeric_limits<float>::max();
  CHECK_EQ(widehead::bf16_float(widehead::bf16_nearest(largest)), kInfinity);
  CHECK_EQ(widehead::bf16_float(widehead::bf16_nearest(-kInfinity)), -kInfinity);
}

TEST(bf16_stochastic_is_exact_in_expectation) {
  // Over all 65536 values of the random bits, the share that rounds away from zero is the part cut off, exactly.
  for (std::uint32_t u : {0x3F800001u, 0x3F808000u, 0xBF80FFFFu, 0x00000123u, 0x7F7F0000u, 0x42C8A5C3u, 0x8000FFFFu}) {
    const float x = widehead::bits_float(u);
    const auto low = static_cast<std::uint16_t>(u >> 16);
    std::uint32_t away = 0;
    for (std::uint32_t r = 0; r < 65536; ++r) {
      const std::uint16_t got = widehead::bf16_stochastic(x, r);
      CHECK(got == low || got == low + 1);
      away += got != low;
    }
    CHECK_EQ(away, u & 0xFFFFu);
  }
  CHECK_EQ(widehead::bf16_float(widehead::bf16_stochastic(kInfinity, 0xFFFF)), kInfinity);
  CHECK_EQ(widehead::bf16_float(widehead::bf16_stochastic(-kInfinity, 0xFFFF)), -kInfinity);
}

TEST(bf16_stochastic_with_the_generator_is_unbiased) {
  const RandomStream s{21, widehead::Purpose::rounding_weight, 4};
  for (float x : {1.001f, -3.14159f, 1e-3f, 0.99999f}) {
    constexpr int kDraws = 20000;
    double sum = 0;
    for (std::uint64_t i = 0; i < kDraws; ++i) {
      sum += widehead::bf16_float(widehead::bf16_stochastic(x, s.bits16(i / 100, i % 100)));
    }
    const std::uint32_t u = widehead::float_bits(x), part = u & 0xFFFF;
    const double step = std::fabs(double(widehead::bits_float((u & 0xFFFF0000u) + 0x10000u)) -
                                  double(widehead::bits_float(u & 0xFFFF0000u)));
    const double p = part / 65536.0;
    CHECK_NEAR(sum / kDraws, x, 5 * step * std::sqrt(p * (1 - p) / kDraws));
  }
}

// Half precision by its definition.
double half_value(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * double(kInfinity);
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

TEST(half_to_float_and_back) {
  for (std::uint32_t b = 0; b < 65536; ++b) {
    const auto h = static_cast<std::uint16_t>(b);
    const float x = widehead::f16_float(h);
    if (std::isnan(half_value(h))) {
      CHECK(std::isnan(x));
      CHECK(std::isnan(half_value(widehead::f16_nearest(x))));
      continue;
    }
    CHECK_EQ(double(x), half_value(h));
    CHECK_EQ(std::signbit(x), (h & 0x8000) != 0);
    CHECK_EQ(widehead::f16_nearest(x), h);
  }
}

TEST(half_nearest_between_its_values) {
  for (std::uint32_t b = 0; b < 0x7BFF; ++b) {
    const auto low = static_cast<std::uint16_t>(b), high = static_cast<std::uint16_t>(b + 1);
    const float from = widehead::f16_float(low), to = widehead::f16_float(high), middle = from + (to - from) / 2;
    for (float x : {std::nextafter(from, kInfinity), std::nextafter(middle, -kInfinity), middle,
                    std::nextafter(middle, kInfinity), std::nextafter(to, -kInfinity)}) {
      const std::uint16_t expected = nearest_of(x, low, high, widehead::f16_float);
      CHECK_EQ(widehead::f16_nearest(x), expected);
      CHECK_EQ(widehead::f16_nearest(-x), static_cast<std::uint16_t>(expected | 0x8000));
    }
  }
}

TEST(half_stochastic_is_exact_in_expectation) {
  // The mean over all 65536 values of the random bits: x itself, or below 2^-14 x cut to a multiple of 2^-40.
  for (float x : {1.0f, 1.0001f, -3.14159f, 65503.9f, 0x1.0007p-14f, 0x1.fffffep-15f, 6.1e-5f, 1e-6f, -0x1p-25f,
                  0x1p-40f, 0x1.8p-41f, 0.0f}) {
    double sum = 0, low = kInfinity, high = -kInfinity;
    for (std::uint32_t r = 0; r < 65536; ++r) {
      const double got = half_value(widehead::f16_stochastic(x, r));
      sum += got;
      low = std::min(low, got);
      high = std::max(high, got);
    }
    const double kept = std::fabs(x) < 0x1p-14 ? std::trunc(double(x) * 0x1p40) * 0x1p-40 : double(x);
    CHECK_EQ(sum / 65536, kept);
    const double unit = std::ldexp(1.0, std::max(std::ilogb(std::max(std::fabs(x), 0x1p-14f)) - 10, -24));
    CHECK(low <= kept && kept <= high && high - low <= unit);
  }
  // Values of its own stay, as do the ends.
  for (std::uint32_t b = 0; b < 65536; ++b) {
    const auto h = static_cast<std::uint16_t>(b);
    const float x = widehead::f16_float(h);
    for (std::uint32_t r : {0x0u, 0x7FFFu, 0xFFFFu}) {
      if (std::isnan(x)) {
        CHECK(std::isnan(half_value(widehead::f16_stochastic(x, r))));
      } else {
        CHECK_EQ(widehead::f16_stochastic(x, r), h);
      }
    }
  }
  for (float x : {std::nextafter(65520.0f, 0.0f), 65520.0f, -1e30f})
    for (std::uint32_t r : {0x0u, 0xFFFFu}) CHECK_EQ(widehead::f16_stochastic(x, r), widehead::f16_nearest(x));
}

TEST(half_at_the_ends) {
  CHECK_EQ(widehead::f16_nearest(65504.0f), 0x7BFF);
  CHECK_EQ(widehead::f16_nearest(std::nextafter(65520.0f, 0.0f)), 0x7BFF);
  CHECK_EQ(widehead::f16_nearest(65520.0f), 0x7C00);
  CHECK_EQ(widehead::f16_nearest(-1e30f), 0xFC00);
  CHECK_EQ(widehead::f16_nearest(kInfinity), 0x7C00);
  CHECK_EQ(widehead::f16_nearest(0x1p-25f), 0);  // half the smallest: a tie, to even
  CHECK_EQ(widehead::f16_nearest(std::nextafter(0x1p-25f, 1.0f)), 1);
  CHECK_EQ(widehead::f16_nearest(-0.0f), 0x8000);
  CHECK_EQ(widehead::f16_nearest(std::numeric_limits<float>::denorm_min()), 0);
  // A NaN whose payload lies only in the bits that are cut off.
  CHECK(std::isnan(widehead::f16_float(widehead::f16_nearest(widehead::bits_float(0x7F800001u)))));
}

}  // namespace
