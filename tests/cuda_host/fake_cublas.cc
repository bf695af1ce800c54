// fake_cublas.cc -- the functions of cuBLAS that widehead calls, on host memory: the emulation's libcublas.so.13
#include <cstddef>
#include <cstdint>
#include <vector>

#include "widehead/random.h"

namespace {

using widehead::bf16_float;
using widehead::bf16_nearest;
using widehead::f16_float;
using widehead::f16_nearest;

int workspaces = 0, streams = 0;

double load(const void* p, int type, std::size_t i) {
  switch (type) {
    case 0: return static_cast<double>(static_cast<const float*>(p)[i]);
    case 1: return static_cast<const double*>(p)[i];
    case 2: return static_cast<double>(f16_float(static_cast<const std::uint16_t*>(p)[i]));
    default: return static_cast<double>(bf16_float(static_cast<const std::uint16_t*>(p)[i]));
  }
}
void store(void* p, int type, std::size_t i, double x) {
  switch (type) {
    case 0: static_cast<float*>(p)[i] = static_cast<float>(x); break;
    case 1: static_cast<double*>(p)[i] = x; break;
    case 2: static_cast<std::uint16_t*>(p)[i] = f16_nearest(static_cast<float>(x)); break;
    default: static_cast<std::uint16_t*>(p)[i] = bf16_nearest(static_cast<float>(x));
  }
}

// op(X) [rows, cols], column-major, as doubles in row-major order.
std::vector<double> read(const void* x, int type, int ld, bool transposed, int rows, int cols) {
  std::vector<double> out(static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols));
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const auto at = transposed
                          ? static_cast<std::size_t>(i) * static_cast<std::size_t>(ld) + static_cast<std::size_t>(j)
                          : static_cast<std::size_t>(j) * static_cast<std::size_t>(ld) + static_cast<std::size_t>(i);
      out[static_cast<std::size_t>(i) * static_cast<std::size_t>(cols) + static_cast<std::size_t>(j)] =
          load(x, type, at);
    }
  return out;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
__attribute__((visibility("default"))) int fake_cublas_handles = 0;  // created so far
}
EXPORT int cublasCreate_v2(void** handle) {
  static int one;
  *handle = &one;
  return ++fake_cublas_handles, 0;
}
EXPORT int cublasSetStream_v2(void*, void*) { return ++streams, 0; }
EXPORT int cublasSetWorkspace_v2(void*, void* workspace, std::size_t bytes) {
  if (!workspace || bytes == 0 || reinterpret_cast<std::uintptr_t>(workspace) % 256) return 7;
  return ++workspaces, 0;
}
EXPORT int cublasSetMathMode(void*, int) { return 0; }
EXPORT int cublasGemmEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type_a,
                        int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc,
                        int compute, int) {
  if (!workspaces || !streams || type_a != type_b || k < 0) return 7;
  if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return 7;
  const bool wide = compute == 70;
  if (wide != (type_a == 1)) return 15;
  const double scale =
      wide ? *static_cast<const double*>(alpha) : static_cast<double>(*static_cast<const float*>(alpha));
  const double keep = wide ? *static_cast<const double*>(beta) : static_cast<double>(*static_cast<const float*>(beta));
  const auto x = read(a, type_a, lda, ta != 0, m, k), y = read(b, type_b, ldb, tb == 0, n, k);
  const auto depth = static_cast<std::size_t>(k);
  for (int j = 0; j < n; ++j) {
    // op(B) is k x n; read() was asked for its transpose.
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      const double *p = x.data() + static_cast<std::size_t>(i) * depth,
                   *q = y.data() + static_cast<std::size_t>(j) * depth;
      for (std::size_t l = 0; l < depth; ++l) sum += p[l] * q[l];
      const std::size_t at = static_cast<std::size_t>(j) * static_cast<std::size_t>(ldc) + static_cast<std::size_t>(i);
      store(c, type_c, at, scale * sum + (keep != 0 ? keep * load(c, type_c, at) : 0.0));
    }
  }
  return 0;
}
