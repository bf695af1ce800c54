// gemm.h -- one register-blocked micro-kernel that serves every product of the fused heads
//
//   C[i][0..PW) += sum_j A(i, j) * B[j][0..PW)        A broadcast, B and C panels of PW = 2 vectors
//
// With 12 rows and 2 vectors of AVX-512, 24 accumulators + 2 loads + 1 broadcast fit the 32 registers, and 24 independent
// chains cover the latency (4) x throughput (2) of the multiply-add three times; 14 loads for 24 FMAs stay below two loads a
// cycle. Units with 16 registers use 6 rows. All operands are packed in panels [outer][rows][PW], so every stride inside
// is a compile-time constant and no power-of-two row stride can make cache sets collide.
#pragma once
#include "cpu/simd.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

#if WIDEHEAD_VECTOR_BYTES == 64
constexpr int kMaxRows = 12, kRowStep = 4;
#else
constexpr int kMaxRows = 6, kRowStep = 2;
#endif

// An arithmetic mode: Elem is what A and B hold; a pair of bfloat16 counts as one Elem whose product is a two-term dot.
struct ModeF32 {
  using Real = float;
  using Elem = float;
  using Weight = float;
  static constexpr int kPack = 1;
  static WIDEHEAD_INLINE Vec<float> madd(Vec<float> acc, Vec<float> a, Vec<float> b) { return acc + a * b; }
};
struct ModeF64 {
  using Real = double;
  using Elem = double;
  using Weight = double;
  static constexpr int kPack = 1;
  static WIDEHEAD_INLINE Vec<double> madd(Vec<double> acc, Vec<double> a, Vec<double> b) { return acc + a * b; }
};
// bfloat16 weights, widened to float32 when packed.
struct ModeBf16Wide : ModeF32 {
  using Weight = uint16_t;
};
#ifdef WIDEHEAD_BF16_DOT
struct ModeBf16Dot {
  using Real = float;
  using Elem = uint32_t;
  using Weight = uint16_t;
  static constexpr int kPack = 2;
  static WIDEHEAD_INLINE Vec<float> madd(Vec<float> acc, Words a, Words b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
};
using ModeBf16 = ModeBf16Dot;
#else
using ModeBf16 = ModeBf16Wide;
#endif

template <class Real>
constexpr int kPanel = 2 * Simd<Real>::kLanes;

// How A(i, j) lies in memory. rows: a[(j / PW) * outer + i * PW + j % PW]; columns: a[j * PW + i].
enum class Order { rows, columns };

// Memory that a later tile will read, fetched into the second-level cache a few lines at a time between the products: a tile
// copied straight from memory would leave the arithmetic idle for a quarter of the step.
struct Prefetch {
  const char* next = nullptr;
  const char* end = nullptr;
  i64 lines = 0;  // a panel of depth

  WIDEHEAD_INLINE void pull() {
    for (i64 i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <class M, Order kOrder, int kRows, int kVectors>
inline void micro_kernel(const typename M::Elem* __restrict__ a, i64 outer, const typename M::Elem* __restrict__ b,
                         i64 depth, typename M::Real* __restrict__ c, bool accumulate, Prefetch& prefetch) {
  using Real = typename M::Real;
  constexpr int kLanes = Simd<Real>::kLanes, kP = kPanel<Real>;
  Vec<Real> acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? load(c + i * kP + v * kLanes) : Vec<Real>{};
  const auto step = [&](const typename M::Elem* ap) __attribute__((always_inline)) {
    decltype(load(b)) bv[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * kLanes);
    b += kP;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto av = splat(ap[kOrder == Order::rows ? i * kP : i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = M::madd(acc[i][v], av, bv[v]);
    }
  };
  if constexpr (kOrder == Order::rows) {
    for (; depth >= kP; depth -= kP, a += outer) {
      prefetch.pull();
#pragma GCC unroll 2
      for (int j = 0; j < kP; ++j) step(a + j);
    }
    for (int j = 0; j < depth; ++j) step(a + j);
  } else {
    for (i64 j = 0; j < depth; ++j) step(a + j * kP);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + i * kP + v * kLanes, acc[i][v]);
}

template <class M, Order kOrder, int kRows>
inline void micro_rows(const typename M::Elem* a, i64 outer, const typename M::Elem* b, i64 depth, typename M::Real* c,
                       bool accumulate, int vectors, Prefetch& prefetch) {
  if (vectors == 2) {
    micro_kernel<M, kOrder, kRows, 2>(a, outer, b, depth, c, accumulate, prefetch);
  } else {
    micro_kernel<M, kOrder, kRows, 1>(a, outer, b, depth, c, accumulate, prefetch);
  }
}

// C panel [rows][PW] (+)= A x B panel [depth][PW]; rows is a multiple of kRowStep; only the first `vectors` vectors count.
template <class M, Order kOrder>
inline void gemm_panel(const typename M::Elem* a, i64 outer, i64 rows, const typename M::Elem* b, i64 depth,
                       typename M::Real* c, bool accumulate, int vectors, Prefetch& prefetch) {
  constexpr int kP = kPanel<typename M::Real>;
  for (i64 i = 0; i < rows;) {
    const i64 left = rows - i;
    const typename M::Elem* ai = a + (kOrder == Order::rows ? i * kP : i);
    typename M::Real* ci = c + i * kP;
    // kRowStep rows alone are too few chains to cover the latency: where they would be left over, two equal groups.
    if (left >= kMaxRows && left != kMaxRows + kRowStep) {
      micro_rows<M, kOrder, kMaxRows>(ai, outer, b, depth, ci, accumulate, vectors, prefetch);
      i += kMaxRows;
    } else if (left >= 2 * kRowStep) {
      micro_rows<M, kOrder, 2 * kRowStep>(ai, outer, b, depth, ci, accumulate, vectors, prefetch);
      i += 2 * kRowStep;
    } else {
      micro_rows<M, kOrder, kRowStep>(ai, outer, b, depth, ci, accumulate, vectors, prefetch);
      i += kRowStep;
    }
  }
}

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
