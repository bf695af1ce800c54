// matmul-inl.h -- one block of a dense matrix product: packing, the micro-kernel, writing with alpha and beta
//
// The right operand is packed in panels [panel][k][PW]. The left one is packed the way its rows lie in memory, so that
// packing is copying: [k panel][row][PW] (Order::rows) when it is stored m x k, [row panel][k][PW] (Order::columns) when
// it is stored transposed. Only a transposed right operand needs its elements moved across rows.
#pragma once
#include "cpu/gemm.h"
#include "cpu/matmul.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

// PW elements of a row of which `count` exist; zeros after them.
template <class Real>
WIDEHEAD_INLINE void copy_lanes(const Real* in, Real* out, i64 count) {
  constexpr i64 kP = kPanel<Real>, kLanes = kP / 2;
  if (count >= kP) {
    for (int v = 0; v < 2; ++v) store(out + v * kLanes, load(in + v * kLanes));
  } else {
    for (i64 j = 0; j < kP; ++j) out[j] = j < count ? in[j] : Real{0};
  }
}

// in [depth, width] -> [width / PW][depth][PW]
template <class Real>
void pack_across(const Real* in, i64 stride, i64 depth, i64 width, Real* out) {
  constexpr i64 kP = kPanel<Real>;
  for (i64 k = 0; k < depth; ++k)
    for (i64 j = 0; j < width; j += kP) copy_lanes(in + k * stride + j, out + j * depth + k * kP, width - j);
}

// in [rows, depth] -> [depth / PW][padded][PW]; rows up to `padded` are zeros.
template <class Real>
void pack_along(const Real* in, i64 stride, i64 depth, i64 rows, i64 padded, Real* out) {
  constexpr i64 kP = kPanel<Real>;
  for (i64 i = 0; i < padded; ++i)
    for (i64 k = 0; k < depth; k += kP)
      copy_lanes(in + (i < rows ? i * stride + k : 0), out + k * padded + i * kP, i < rows ? depth - k : 0);
}

// Lanes x lanes elements, rows to columns: as many perfect shuffles of the whole square as a lane number has bits.
template <class Real>
WIDEHEAD_INLINE void transpose_square(const Real* in, i64 stride, Real* out, i64 out_stride) {
  constexpr int kLanes = Simd<Real>::kLanes;
  typename Simd<Real>::I lower{}, upper{};
  for (int i = 0; i < kLanes; ++i) {
    lower[i] = static_cast<uint32_t>(i / 2 + (i % 2) * kLanes);
    upper[i] = lower[i] + kLanes / 2;
  }
  Vec<Real> x[kLanes], y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = load(in + i * stride);
#pragma GCC unroll 4
  for (int bits = 1; bits < kLanes; bits *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], lower);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], upper);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, x[i]);
}

// in [width, depth] -> [width / PW][depth][PW]
template <class Real>
void pack_transposed(const Real* in, i64 stride, i64 depth, i64 width, Real* out) {
  constexpr i64 kP = kPanel<Real>, kLanes = kP / 2;
  for (i64 j = 0; j < width; j += kLanes) {
    Real* panel = out + j / kP * kP * depth + j % kP;
    i64 k = 0;
    if (width - j >= kLanes)
      for (; k + kLanes <= depth; k += kLanes) transpose_square(in + j * stride + k, stride, panel + k * kP, kP);
    for (; k < depth; ++k)
      for (i64 i = 0; i < kLanes; ++i) panel[k * kP + i] = j + i < width ? in[(j + i) * stride + k] : Real{0};
  }
}

// C rows [0, rows) of `cols` <= PW columns from a panel [rows][PW]; of row i no more than `diagonal` + i columns.
template <class Real>
WIDEHEAD_INLINE void write_panel(const Real* panel, i64 rows, i64 cols, i64 diagonal, Real alpha, Real beta, Real* c,
                                 i64 stride) {
  constexpr i64 kP = kPanel<Real>, kLanes = kP / 2;
  for (i64 i = 0; i < rows; ++i, panel += kP, c += stride) {
    const i64 count = at_most(cols, diagonal + i);
    if (count == kP) {
      for (i64 j = 0; j < kP; j += kLanes) {
        const Vec<Real> x = alpha * load(panel + j);
        store(c + j, beta == 0 ? x : beta * load(c + j) + x);
      }
    } else if (beta == 0) {
      for (i64 j = 0; j < count; ++j) c[j] = alpha * panel[j];
    } else {
      for (i64 j = 0; j < count; ++j) c[j] = beta * c[j] + alpha * panel[j];
    }
  }
}

// Terms [k, k + depth) of the rows and columns of a block.
template <Order kOrder, class Real>
void pack_operands(const Product<Real>& p, i64 row, i64 rows, i64 col, i64 cols, i64 k, i64 depth, Real* a, Real* b) {
  if (kOrder == Order::columns) {
    pack_across(p.a + k * p.a_stride + row, p.a_stride, depth, rows, a);
  } else {
    pack_along(p.a + row * p.a_stride + k, p.a_stride, depth, rows, round_up(rows, kRowStep), a);
  }
  if (p.b_transposed) {
    pack_transposed(p.b + col * p.b_stride + k, p.b_stride, depth, cols, b);
  } else {
    pack_across(p.b + k * p.b_stride + col, p.b_stride, depth, cols, b);
  }
}

template <class M, Order kOrder>
void product_block_as(const Product<typename M::Real>& p, const ProductBlock& block, typename M::Real* scratch) {
  using Real = typename M::Real;
  constexpr i64 kP = kPanel<Real>;
  // Rows written together; in panels of columns a group may not leave its panel.
  constexpr i64 kGroup = kOrder == Order::columns ? kP : 2 * kMaxRows;
  alignas(64) Real group[kGroup * kP];
  const i64 row = block.row, rows = block.rows, col = block.col;
  const i64 cols = p.lower ? at_most(block.cols, row + rows - col) : block.cols;
  const i64 padded = round_up(rows, kRowStep);
  Real* a = scratch;
  Real* b = scratch + round_up(rows, 32) * block.depth;
  Prefetch none;
  i64 k = 0;
  do {
    const i64 depth = at_most(block.depth, p.k - k);
    if (depth > 0) pack_operands<kOrder>(p, row, rows, col, cols, k, depth, a, b);
    const Real beta = k == 0 ? p.beta : Real{1};
    for (i64 j = 0; j < cols; j += kP) {
      const i64 width = at_most(kP, cols - j), above = col + j - row;  // rows of the block above the diagonal
      for (i64 i = p.lower && above > 0 ? above / kGroup * kGroup : 0; i < rows; i += kGroup) {
        const i64 count = at_most(kGroup, rows - i);
        Real* c = p.c + (row + i) * p.c_stride + col + j;
        // On their way while the product runs: else the writing waits for lines of C that are in no near cache.
        for (i64 r = 0; r < count; ++r) {
          __builtin_prefetch(c + r * p.c_stride, 1);
          __builtin_prefetch(c + r * p.c_stride + kP / 2, 1);
        }
        gemm_panel<M, kOrder>(a + i * (kOrder == Order::columns ? depth : kP), padded * kP, round_up(count, kRowStep),
                              b + j * depth, depth, group, false, width > kP / 2 ? 2 : 1, none);
        write_panel(group, count, width, p.lower ? i - above + 1 : kP, p.alpha, beta, c, p.c_stride);
      }
    }
    k += depth;
  } while (k < p.k);
}

// Packing the right operand pays from some rows on only. Below, it is read as it lies.
constexpr i64 kFewRows = kMaxRows / 2, kFewVectors = kMaxRows == 12 ? 4 : 2;

// Columns [col, col + kVectors vectors) of rows [row, row + kRows), of which those before `from` are left alone.
template <class M, int kRows, int kVectors>
void few_columns(const Product<typename M::Real>& p, i64 row, i64 col, i64 from) {
  using Real = typename M::Real;
  constexpr i64 kLanes = Simd<Real>::kLanes;
  Vec<Real> acc[kRows][kVectors] = {};
  const Real *a = p.a + row * p.a_stride, *b = p.b + col;
  for (i64 k = 0; k < p.k; ++k, b += p.b_stride) {
    Vec<Real> bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto av = splat(a[i * p.a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = M::madd(acc[i][v], av, bv[v]);
    }
  }
  alignas(64) Real out[kVectors * kLanes];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, acc[i][v]);
    Real* c = p.c + (row + i) * p.c_stride + col;
    for (i64 j = from - col; j < kVectors * kLanes; ++j)
      c[j] = p.beta == 0 ? p.alpha * out[j] : p.beta * c[j] + p.alpha * out[j];
  }
}

template <class M, int kVectors>
void few_rows(const Product<typename M::Real>& p, i64 row, i64 rows, i64 col, i64 from) {
  static_assert(kFewRows <= 6);
  switch (rows) {
    case 1: return few_columns<M, 1, kVectors>(p, row, col, from);
    case 2: return few_columns<M, 2, kVectors>(p, row, col, from);
    case 3: return few_columns<M, 3, kVectors>(p, row, col, from);
    case 4: return few_columns<M, 4, kVectors>(p, row, col, from);
    case 5: return few_columns<M, 5, kVectors>(p, row, col, from);
    default: return few_columns<M, 6, kVectors>(p, row, col, from);
  }
}

template <class M>
void product_few(const Product<typename M::Real>& p, const ProductBlock& block) {
  constexpr i64 kLanes = Simd<typename M::Real>::kLanes, kWide = kFewVectors * kLanes;
  const i64 end = block.col + block.cols;
  for (i64 row = block.row; row < block.row + block.rows; row += kFewRows) {
    const i64 rows = at_most(kFewRows, block.row + block.rows - row);
    i64 col = block.col;
    for (; col + kWide <= end; col += kWide) few_rows<M, kFewVectors>(p, row, rows, col, col);
    for (; col + kLanes <= end; col += kLanes) few_rows<M, 1>(p, row, rows, col, col);
    if (col < end) few_rows<M, 1>(p, row, rows, end - kLanes, col);
  }
}

template <class M>
void product_block(const Product<typename M::Real>& p, const ProductBlock& block, void* scratch) {
  auto* s = static_cast<typename M::Real*>(scratch);
  if (p.m <= 2 * kFewRows && !p.a_transposed && !p.b_transposed && !p.lower && p.n >= Simd<typename M::Real>::kLanes) {
    product_few<M>(p, block);
  } else if (p.a_transposed) {
    product_block_as<M, Order::columns>(p, block, s);
  } else {
    product_block_as<M, Order::rows>(p, block, s);
  }
}

inline ProductKernels product_table() { return {product_block<ModeF32>, product_block<ModeF64>}; }

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
