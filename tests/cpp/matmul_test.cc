// matmul_test.cc -- dense matrix products against sums in float64; what must stay untouched; the same bits for any threads
#include "cpu/matmul.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/workspace.h"
#include "widehead/parallel.h"

namespace {

using widehead::get_num_threads;
using widehead::parallel_for;
using widehead::set_num_threads;
using widehead::cpu::multiply;
using widehead::cpu::Product;
using i64 = std::int64_t;

struct Shape {
  i64 m, n, k;
};
// Single elements, vectors, sizes around the tiles of every unit, several blocks of k (256), of rows and of columns.
constexpr Shape kShapes[] = {{1, 1, 1},    {1, 1, 300},  {7, 1, 3},      {1, 70, 5},      {13, 33, 31},
                             {24, 32, 32}, {50, 7, 65},  {65, 64, 63},   {12, 16, 257},   {100, 45, 300},
                             {3, 530, 40}, {301, 5, 40}, {259, 291, 20}, {130, 270, 515}, {2, 75, 300},
                             {5, 33, 20},  {6, 64, 3},   {9, 141, 33},   {4, 300, 300}};

template <class Real>
constexpr Real kGuard = Real(1234.5);

// A matrix whose rows lie `pad` further apart than they are long, with guards between them.
template <class Real>
struct Matrix {
  i64 rows, cols, stride;
  std::vector<Real> data;

  Matrix(i64 r, i64 c, i64 pad, unsigned seed)
      : rows(r), cols(c), stride(c + pad), data(static_cast<std::size_t>(r * (c + pad)), kGuard<Real>) {
    std::mt19937 random(seed);
    for (i64 i = 0; i < r; ++i)
      for (i64 j = 0; j < c; ++j) at(i, j) = static_cast<Real>(double(random()) * 0x1p-31 - 1.0);
  }
  Real& at(i64 i, i64 j) { return data[static_cast<std::size_t>(i * stride + j)]; }
  Real at(i64 i, i64 j) const { return data[static_cast<std::size_t>(i * stride + j)]; }
  bool guards_whole() const {
    for (i64 i = 0; i < rows; ++i)
      for (i64 j = cols; j < stride; ++j)
        if (at(i, j) != kGuard<Real>) return false;
    return true;
  }
};

template <class Real>
struct Case {
  Shape shape;
  bool a_transposed, b_transposed;
  Matrix<Real> a, b, c;
  Real alpha, beta;
  bool lower = false;

  Case(Shape s, bool ta, bool tb, i64 pad, Real al, Real be)
      : shape(s),
        a_transposed(ta),
        b_transposed(tb),
        a(ta ? s.k : s.m, ta ? s.m : s.k, pad, 1),
        b(tb ? s.n : s.k, tb ? s.k : s.n, 2 * pad, 2),
        c(s.m, s.n, 3 * pad, 3),
        alpha(al),
        beta(be) {}
  Product<Real> product(Matrix<Real>& out) const {
    return {.m = shape.m,
            .n = shape.n,
            .k = shape.k,
            .a = a.data.data(),
            .a_stride = a.stride,
            .a_transposed = a_transposed,
            .b = b.data.data(),
            .b_stride = b.stride,
            .b_transposed = b_transposed,
            .c = out.data.data(),
            .c_stride = out.stride,
            .alpha = alpha,
            .beta = beta,
            .lower = lower};
  }
  Matrix<Real> run() const {
    Matrix<Real> out = c;
    multiply(product(out));
    return out;
  }
};

template <class Real>
void check_against_float64(const Case<Real>& t) {
  const Matrix<Real> out = t.run();
  const auto [m, n, k] = t.shape;
  const double unit = 0.5 * std::numeric_limits<Real>::epsilon();
  int wrong = 0;
  for (i64 i = 0; i < m; ++i)
    for (i64 j = 0; j < n; ++j) {
      if (t.lower && j > i) {
        wrong += out.at(i, j) != t.c.at(i, j);
        continue;
      }
      double sum = 0, size = 0;
      for (i64 e = 0; e < k; ++e) {
        const double term =
            double(t.a_transposed ? t.a.at(e, i) : t.a.at(i, e)) * double(t.b_transposed ? t.b.at(j, e) : t.b.at(e, j));
        sum += term;
        size += std::fabs(term);
      }
      const double old = t.beta == 0 ? 0.0 : double(t.beta) * double(t.c.at(i, j));
      const double want = double(t.alpha) * sum + old;
      // Rounding of k terms, of alpha and of beta C; twice, for in float64 the sum that is compared with is rounded too.
      const double bound = 2 * (double(k) + 6) * unit * (std::fabs(double(t.alpha)) * size + std::fabs(old));
      wrong += !(std::fabs(double(out.at(i, j)) - want) <= bound);
    }
  if (wrong != 0)
    check::fail(__FILE__, __LINE__,
                check::show(wrong) + " wrong elements at m " + check::show(m) + " n " + check::show(n) + " k " +
                    check::show(k) + (t.a_transposed ? " A^T" : " A") + (t.b_transposed ? " B^T" : " B") + " alpha " +
                    check::show(t.alpha) + " beta " + check::show(t.beta) + (t.lower ? " lower" : ""));
  CHECK(out.guards_whole());
}

template <class Real>
void check_all_shapes() {
  for (const Shape& shape : kShapes)
    for (int transposed = 0; transposed < 4; ++transposed) {
      check_against_float64(Case<Real>(shape, transposed & 1, transposed & 2, 0, 1, 0));
      check_against_float64(Case<Real>(shape, transposed & 1, transposed & 2, 3, Real(-0.75), Real(1.5)));
    }
}
TEST(float32_matches_float64_for_all_shapes_and_transposes) { check_all_shapes<float>(); }
TEST(float64_matches_sums_for_all_shapes_and_transposes) { check_all_shapes<double>(); }

template <class Real>
void check_lower() {
  for (const i64 n : {1, 23, 65, 300})
    for (const i64 k : {1, 40, 270})
      for (int transposed = 0; transposed < 4; ++transposed) {
        Case<Real> t({n, n, k}, transposed & 1, transposed & 2, 5, Real(0.5), transposed == 2 ? Real(0) : Real(1));
        t.lower = true;
        check_against_float64(t);
      }
}
TEST(lower_leaves_what_is_above_the_diagonal_alone) {
  check_lower<float>();
  check_lower<double>();
}

TEST(beta_zero_overwrites_nan_and_alpha_zero_reads_no_operand) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Case<float> t({45, 70, 300}, false, false, 2, 1, 0);
  for (i64 i = 0; i < 45; ++i)
    for (i64 j = 0; j < 70; ++j) t.c.at(i, j) = nan;
  check_against_float64(t);
  // A NaN in an operand comes through, and only to its own row.
  t.a.at(17, 299) = nan;
  const Matrix<float> row = t.run();
  int lost = 0, spread = 0;
  for (i64 i = 0; i < 45; ++i)
    for (i64 j = 0; j < 70; ++j) (i == 17 ? lost : spread) += std::isnan(row.at(i, j)) != (i == 17);
  CHECK_EQ(lost, 0);
  CHECK_EQ(spread, 0);
  t.alpha = 0;
  const Matrix<float> zero = t.run();
  t.c = zero;
  t.c.at(3, 4) = 2;
  t.beta = 4;
  const Matrix<float> scaled = t.run();
  for (i64 i = 0; i < 45; ++i)
    for (i64 j = 0; j < 70; ++j) {
      CHECK_EQ(zero.at(i, j), 0.0f);
      CHECK_EQ(scaled.at(i, j), i == 3 && j == 4 ? 8.0f : 0.0f);
    }
}

TEST(empty_products) {
  for (int transposed = 0; transposed < 4; ++transposed) {
    check_against_float64(Case<double>({5, 40, 0}, transposed & 1, transposed & 2, 1, 1, 0));
    check_against_float64(Case<double>({5, 40, 0}, transposed & 1, transposed & 2, 1, 1, 3));
  }
  // No rows or no columns: nothing to write to.
  multiply(Product<float>{.m = 0, .n = 5, .k = 3, .a_stride = 3, .b_stride = 5, .c_stride = 5});
  multiply(Product<float>{.m = 5, .n = 0, .k = 3, .a_stride = 3, .b_stride = 1, .c_stride = 1});
  // No terms: the operands need no memory.
  std::vector<float> c(60, 3.0f);
  multiply(
      Product<float>{.m = 30, .n = 2, .k = 0, .a_stride = 1, .b_stride = 2, .c = c.data(), .c_stride = 2, .beta = 2});
  CHECK(c == std::vector<float>(60, 6.0f));
}

template <class Real>
bool same_bits(const Matrix<Real>& x, const Matrix<Real>& y) {
  return x.data.size() == y.data.size() && std::memcmp(x.data.data(), y.data.data(), x.data.size() * sizeof(Real)) == 0;
}

template <class Real>
void check_threads() {
  const int before = get_num_threads();
  for (const Shape& shape : {Shape{300, 300, 128}, Shape{263, 541, 300}, Shape{1000, 129, 60}})
    for (int transposed = 0; transposed < 4; ++transposed) {
      Case<Real> t(shape, transposed & 1, transposed & 2, 1, Real(0.3), Real(0.7));
      t.lower = shape.m == shape.n && transposed % 2 == 1;
      set_num_threads(1);
      const Matrix<Real> one = t.run();
      CHECK(!same_bits(one, t.c));
      for (const int threads : {2, 4, 7}) {
        set_num_threads(threads);
        CHECK(same_bits(t.run(), one));
      }
    }
  set_num_threads(before);
}
TEST(same_bits_for_any_number_of_threads) {
  check_threads<float>();
  check_threads<double>();
}

TEST(inside_a_task_that_holds_scratch) {
  using widehead::cpu::Slot;
  using widehead::cpu::workspace;
  const int before = get_num_threads();
  set_num_threads(4);
  const Case<float> t({200, 210, 150}, false, true, 1, 1, 0);
  const Matrix<float> want = t.run();
  constexpr i64 kTasks = 9, kBytes = 1 << 16;
  std::vector<Matrix<float>> out(kTasks, t.c);
  std::vector<int> kept(kTasks);
  auto* outer = static_cast<unsigned char*>(workspace(Slot::call, kBytes));
  std::memset(outer, 0xA5, kBytes);
  parallel_for(kTasks, [&](i64 i) {
    auto* mine = static_cast<unsigned char*>(workspace(Slot::task, kBytes));
    std::memset(mine, static_cast<int>(i), kBytes);
    multiply(t.product(out[static_cast<std::size_t>(i)]));
    int same = 0;
    for (i64 j = 0; j < kBytes; ++j) same += mine[j] == i;
    kept[static_cast<std::size_t>(i)] = same;
  });
  set_num_threads(before);
  for (const Matrix<float>& m : out) CHECK(same_bits(m, want));
  CHECK(kept == std::vector<int>(kTasks, kBytes));
  int whole = 0;
  for (i64 j = 0; j < kBytes; ++j) whole += outer[j] == 0xA5;
  CHECK_EQ(whole, kBytes);
}

}  // namespace
