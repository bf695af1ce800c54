// simd.h -- vectors of the unit being compiled: a thin layer over the compiler's vector extensions
//
// A unit defines WIDEHEAD_VECTOR_BYTES (16, 32 or 64), WIDEHEAD_ISA_NAME (its namespace) and, where the processor has bfloat16 dot
// products, WIDEHEAD_BF16_DOT. No std templates: a shared instantiation would carry this unit's instructions elsewhere.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

using i64 = int64_t;

#define WIDEHEAD_INLINE inline __attribute__((always_inline))

WIDEHEAD_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
WIDEHEAD_INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
WIDEHEAD_INLINE i64 at_most(i64 a, i64 b) { return a < b ? a : b; }

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t I __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  static constexpr int kLanes = WIDEHEAD_VECTOR_BYTES / 4;
  static constexpr uint32_t kMagnitude = 0x7FFFFFFF;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t I __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  static constexpr int kLanes = WIDEHEAD_VECTOR_BYTES / 8;
  static constexpr uint64_t kMagnitude = 0x7FFFFFFFFFFFFFFF;
};
template <class T>
using Vec = typename Simd<T>::V;

template <class T>
WIDEHEAD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
WIDEHEAD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
template <class T>
WIDEHEAD_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class V>
WIDEHEAD_INLINE V max(V a, V b) {
  return a > b ? a : b;  // b where a is NaN
}
template <class V>
WIDEHEAD_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class T>
WIDEHEAD_INLINE Vec<T> abs(Vec<T> a) {
  typedef typename Simd<T>::I I;
  return (Vec<T>)((I)a & Simd<T>::kMagnitude);
}
template <class T>
WIDEHEAD_INLINE T sum_lanes(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < Simd<T>::kLanes; ++i) s += v[i];
  return s;
}
template <class T>
WIDEHEAD_INLINE T max_lanes(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < Simd<T>::kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Bit i is set where a[i] > b[i].
WIDEHEAD_INLINE uint32_t greater_mask(Vec<float> a, Vec<float> b) {
#if WIDEHEAD_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif WIDEHEAD_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  uint32_t m = 0;
  for (int i = 0; i < Simd<float>::kLanes; ++i) m |= (a[i] > b[i] ? 1u : 0u) << i;
  return m;
#endif
}
WIDEHEAD_INLINE uint32_t greater_mask(Vec<double> a, Vec<double> b) {
  uint32_t m = 0;
  for (int i = 0; i < Simd<double>::kLanes; ++i) m |= (a[i] > b[i] ? 1u : 0u) << i;
  return m;
}

// Whether some a[i] is not zero; NaN is not.
WIDEHEAD_INLINE bool any_nonzero(Vec<float> a) {
#if WIDEHEAD_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
#elif WIDEHEAD_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_setzero_ps(), _CMP_NEQ_UQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < Simd<float>::kLanes; ++i) any = any || a[i] != 0;
  return any;
#endif
}
WIDEHEAD_INLINE bool any_nonzero(Vec<double> a) {
  bool any = false;
  for (int i = 0; i < Simd<double>::kLanes; ++i) any = any || a[i] != 0;
  return any;
}

// bfloat16 <-> float32, a vector at a time.
typedef uint16_t HalfWidth __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES / 2)));
typedef uint16_t HalfWidthUnaligned __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));

WIDEHEAD_INLINE Words load(const uint32_t* p) {
  typedef uint32_t Unaligned __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES), aligned(4), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
WIDEHEAD_INLINE Words splat(uint32_t x) { return x + Words{}; }
// By intrinsics where there are some: GCC 12 takes the conversion of a whole vector apart.
WIDEHEAD_INLINE Words load_words(const uint16_t* p) {
#if WIDEHEAD_VECTOR_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif WIDEHEAD_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfWidthUnaligned*>(p), Words);
#endif
}
WIDEHEAD_INLINE Vec<float> load_bf16(const uint16_t* p) { return (Vec<float>)(load_words(p) << 16); }
WIDEHEAD_INLINE void store_halves(uint16_t* p, Words w) {
#if WIDEHEAD_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)w));
#else
  *reinterpret_cast<HalfWidthUnaligned*>(p) = __builtin_convertvector(w, HalfWidth);
#endif
}
// Round to nearest even; NaN keeps a quiet bit.
WIDEHEAD_INLINE Words bf16_bits(Vec<float> x) {
  const Words u = (Words)x;
  const Words rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const Words is_nan = (Words)((u & 0x7FFFFFFFu) > 0x7F800000u);
  return (is_nan & ((u >> 16) | 0x40u)) | (~is_nan & rounded);
}

// The 64-bit products of the lanes with m, split in halves.
WIDEHEAD_INLINE void multiply_wide(Words a, uint32_t m, Words& high, Words& low) {
#if defined(__x86_64__)
#if WIDEHEAD_VECTOR_BYTES == 64
  const __m512i v = (__m512i)a, f = _mm512_set1_epi32(static_cast<int>(m));
  const Words even = (Words)_mm512_mul_epu32(v, f), odd = (Words)_mm512_mul_epu32(_mm512_srli_epi64(v, 32), f);
#elif WIDEHEAD_VECTOR_BYTES == 32
  const __m256i v = (__m256i)a, f = _mm256_set1_epi32(static_cast<int>(m));
  const Words even = (Words)_mm256_mul_epu32(v, f), odd = (Words)_mm256_mul_epu32(_mm256_srli_epi64(v, 32), f);
#else
  const __m128i v = (__m128i)a, f = _mm_set1_epi32(static_cast<int>(m));
  const Words even = (Words)_mm_mul_epu32(v, f), odd = (Words)_mm_mul_epu32(_mm_srli_epi64(v, 32), f);
#endif
  typedef uint64_t Wide __attribute__((vector_size(WIDEHEAD_VECTOR_BYTES)));
  const Wide e = (Wide)even, o = (Wide)odd;
  low = (Words)((e & 0xFFFFFFFFull) | (o << 32));
  high = (Words)((e >> 32) | (o & ~0xFFFFFFFFull));
#else
  for (int i = 0; i < Simd<float>::kLanes; ++i) {
    const uint64_t p = uint64_t{a[i]} * m;
    high[i] = static_cast<uint32_t>(p >> 32);
    low[i] = static_cast<uint32_t>(p);
  }
#endif
}

// a0 b0 a1 b1 ..., first and second half.
WIDEHEAD_INLINE void interleave(Words a, Words b, Words& first, Words& second) {
  constexpr int kLanes = Simd<float>::kLanes;
  Words lower{}, upper{};
  for (int i = 0; i < kLanes; ++i) {
    lower[i] = static_cast<uint32_t>(i / 2 + (i % 2) * kLanes);
    upper[i] = lower[i] + kLanes / 2;
  }
  first = __builtin_shuffle(a, b, lower);
  second = __builtin_shuffle(a, b, upper);
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
