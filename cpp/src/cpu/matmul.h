// matmul.h -- a dense matrix product on the CPU: the interface, and what an instruction-set unit offers for it
#pragma once
#include <cstdint>

namespace widehead::cpu {

// C = alpha op(A) op(B) + beta C; op(A) is m x k, op(B) k x n. Row-major: element (i, j) of a matrix as it is stored lies at
// i * stride + j. Strides are in elements and may be larger than a row; what lies between rows is not touched.
// A transposed operand is stored as k x m (A) or n x k (B). C may not overlap A or B.
// beta = 0 does not read C, alpha = 0 reads neither A nor B.
template <class Real>
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  const Real* a = nullptr;
  std::int64_t a_stride = 0;
  bool a_transposed = false;
  const Real* b = nullptr;
  std::int64_t b_stride = 0;
  bool b_transposed = false;
  Real* c = nullptr;
  std::int64_t c_stride = 0;
  Real alpha = 1, beta = 0;
  bool lower =
      false;  // C is square and only its lower triangle, the diagonal included, is computed; the rest is left alone
};

// On the pool when the product is large enough; the same bits for any number of threads. May be called inside a task.
void multiply(const Product<float>&);
void multiply(const Product<double>&);

// A block of C that one task computes, and how many terms of the sums it takes at a time (a multiple of 32).
struct ProductBlock {
  std::int64_t row, rows, col, cols, depth;
};

struct ProductKernels {
  // scratch: (rows + cols, each rounded up to 32) * depth elements
  void (*f32)(const Product<float>&, const ProductBlock&, void* scratch);
  void (*f64)(const Product<double>&, const ProductBlock&, void* scratch);
};

}  // namespace widehead::cpu
