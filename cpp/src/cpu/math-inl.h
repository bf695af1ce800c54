// math-inl.h -- exp, log1p and tanh on vectors, to about one unit in the last place
#pragma once
#include "cpu/simd.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// exp(x) for x <= 88 (709 in double); exactly 0 below the smallest normal result, NaN for NaN.
// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2 in two parts; the integer n is read from the low bits that adding
// 1.5 * 2^mantissa leaves, so no conversion instruction is needed; unsigned, for lanes below the range wrap around before they
// are dropped. The bits of a NaN would end up in the exponent and make it a number: AVX-512 has an instruction that knows better.
WIDEHEAD_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> shifted, Vec<float> n, Vec<float> x) {
#if WIDEHEAD_VECTOR_BYTES == 64
  (void)shifted, (void)x;
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  typedef uint32_t U __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));  // infinities wrap around
  (void)n;
  const Vec<float> y = (Vec<float>)((U)p + ((U)shifted << 23));
  return x == x ? y : x;
#endif
}
WIDEHEAD_INLINE Vec<double> scale_by_power(Vec<double> p, Vec<double> shifted, Vec<double> n, Vec<double> x) {
#if WIDEHEAD_VECTOR_BYTES == 64
  (void)shifted, (void)x;
  return (Vec<double>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  typedef uint64_t U __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  (void)n;
  const Vec<double> y = (Vec<double>)((U)p + ((U)shifted << 52));
  return x == x ? y : x;
#endif
}

WIDEHEAD_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x < -87.0f ? Vec<float>{} : scale_by_power(p, shifted, n, x);
}
WIDEHEAD_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634074 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  Vec<double> r = x - n * 6.93147180369123816490e-1;
  r = r - n * 1.90821492927058770002e-10;
  Vec<double> p = splat(1.0 / 6227020800.0);
  constexpr double kInverseFactorial[] = {1.0 / 479001600.0,
                                          1.0 / 39916800.0,
                                          1.0 / 3628800.0,
                                          1.0 / 362880.0,
                                          1.0 / 40320.0,
                                          1.0 / 5040.0,
                                          1.0 / 720.0,
                                          1.0 / 120.0,
                                          1.0 / 24.0,
                                          1.0 / 6.0,
                                          0.5,
                                          1.0,
                                          1.0};
  for (double c : kInverseFactorial) p = p * r + c;
  return x < -708.0 ? Vec<double>{} : scale_by_power(p, shifted, n, x);
}

// log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (2 + u)).
WIDEHEAD_INLINE Vec<float> log1p(Vec<float> u) {
  const Vec<float> s = u / (u + 2.0f);
  const Vec<float> q = s * s;
  Vec<float> p = splat(2.0f / 15);
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return p * s;
}
WIDEHEAD_INLINE Vec<double> log1p(Vec<double> u) {
  Vec<double> y = u;
  for (int i = 0; i < Simd<double>::kLanes; ++i) y[i] = __builtin_log1p(u[i]);
  return y;
}

// Odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel.
WIDEHEAD_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = abs<float>(x);
  const Vec<float> e = exp(a * -2.0f);
  const Vec<float> large = (1.0f - e) / (1.0f + e);
  const Vec<float> q = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const Vec<float> small = p * q * x + x;
  const Vec<float> signed_large = x < 0.0f ? -large : large;
  return a < 0.625f ? small : signed_large;
}
WIDEHEAD_INLINE Vec<double> tanh(Vec<double> x) {
  Vec<double> y = x;
  for (int i = 0; i < Simd<double>::kLanes; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
