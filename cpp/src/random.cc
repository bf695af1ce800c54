// random.cc -- IEEE half precision in portable integer arithmetic
#include "widehead/random.h"

namespace widehead {

std::uint16_t f16_nearest(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7FFFFFFFu;
  // NaN stays NaN: the quiet bit is set, for the payload may lie in the bits that are lost.
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  // 65520 is half way from the largest half, 65504, to the next power of two, and ties go to even: up.
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // Subnormal in half, a multiple of 2^-24: adding 0.5, whose last place is 2^-24, lets the processor do the
    // rounding.
    const std::uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    return static_cast<std::uint16_t>(sign | rounded);
  }
  // Exponent bias 127 -> 15, then the 13 bits that go are rounded; a carry runs on into the exponent, as it should.
  const std::uint32_t rebased = magnitude - (std::uint32_t{127 - 15} << 23);
  return static_cast<std::uint16_t>(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13));
}

float f16_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1Fu;
  const std::uint32_t mantissa = h & 0x3FFu;
  if (exponent == 0x1Fu) return bits_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 127 - 15) << 23) | (mantissa << 13));
}

}  // namespace widehead
