// matmul.cc -- cuts a dense matrix product into blocks of C and hands them to the pool
#include "cpu/matmul.h"

#include <algorithm>
#include <cstddef>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "widehead/parallel.h"

namespace widehead::cpu {
namespace {

// A panel of B, depth times two vectors, lies in the first-level cache; a block of A, rows times depth, in the second.
constexpr i64 kDepth = 256;
constexpr i64 kRowBytes = 1920, kColBytes = 2048;  // largest block of C: 480 x 512 in float32
constexpr i64 kRowUnit = 24, kColUnit = 32;  // blocks begin at multiples: whole tiles of the kernels in every unit
constexpr i64 kTaskWork = i64{1} << 20;      // multiply-adds that are worth a task: 10 us or more

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

struct Grid {
  i64 rows, cols;  // of a block

  // Any grid gives the same bits: how k is cut depends on k alone, and a block begins where a panel of any unit does.
  Grid(i64 m, i64 n, i64 k, i64 size, bool lower) {
    i64 down = ceil_div(m, kRowBytes / size), across = ceil_div(n, kColBytes / size);
    const auto cut = [&] {
      rows = round_up(ceil_div(m, down), kRowUnit);
      cols = round_up(ceil_div(n, across), kColUnit);
    };
    cut();
    const i64 threads = get_num_threads();
    if (threads == 1) return;
    // Twice as many tasks as threads, four times where half of them are empty: the last one to end is waited for.
    const i64 wanted =
        std::min(threads * (lower ? 4 : 2), static_cast<i64>(double(m) * double(n) * double(k) / kTaskWork));
    while (down * across < wanted && (rows > kRowUnit || cols > kColUnit)) {
      ++(rows >= cols || cols == kColUnit ? down : across);
      cut();
    }
  }
};

template <class Real>
void multiply_as(Product<Real> p, void (*kernel)(const Product<Real>&, const ProductBlock&, void*)) {
  if (p.m <= 0 || p.n <= 0) return;
  if (p.alpha == 0 || p.k < 0) p.k = 0;
  const Grid grid(p.m, p.n, p.k, sizeof(Real), p.lower);
  const i64 depth = round_up(ceil_div(p.k, std::max<i64>(1, ceil_div(p.k, kDepth))), 32);
  const auto elements = static_cast<std::size_t>((round_up(grid.rows, 32) + grid.cols) * depth);
  const i64 down = ceil_div(p.m, grid.rows), across = ceil_div(p.n, grid.cols);
  const auto run = [&](i64 task) {
    const i64 row = task / across * grid.rows, col = task % across * grid.cols;
    const ProductBlock block{row, std::min(grid.rows, p.m - row), col, std::min(grid.cols, p.n - col), depth};
    if (p.lower && col >= row + block.rows) return;
    kernel(p, block, workspace(Slot::product, elements * sizeof(Real)));
  };
  if (get_num_threads() == 1 || down * across == 1 || double(p.m) * double(p.n) * double(p.k) < 2.0 * kTaskWork) {
    for (i64 i = 0; i < down * across; ++i) run(i);
  } else {
    parallel_for(down * across, run);
  }
}

}  // namespace

void multiply(const Product<float>& p) { multiply_as(p, kernels().product.f32); }
void multiply(const Product<double>& p) { multiply_as(p, kernels().product.f64); }

}  // namespace widehead::cpu
