// cublas.h -- matrix products by cuBLAS, which is found at run time
#pragma once
#include <cstdint>
#include <string>

#include "widehead/view.h"

namespace widehead::cuda {

// The file of the library, for where neither the process nor the loader knows it. Python sets it from cuda.pathfinder.
void set_cublas_path(const std::string& path);

// One operand of a product: row-major, `stride` elements from row to row; `transposed`: its transpose takes part.
struct Operand {
  const void* data;
  std::int64_t stride;
  bool transposed = false;
};

// C [m, n] = A [m, k] B [k, n] + (accumulate ? C : 0), all row-major.
struct Product {
  std::int64_t m, n, k;
  Operand a, b;
  Dtype factors;  // of A and B
  void* c;
  std::int64_t c_stride;
  Dtype result;  // of C: that of the factors, or float32 with 16-bit factors
  bool accumulate = false;
  bool tf32 = false;
};

// cuBLAS works in this much memory of the caller's, so that a graph can capture its calls.
constexpr std::int64_t kCublasWorkspace = std::int64_t{32} << 20;

// cuBLAS bound to one call's device, stream and workspace. Throws BackendError where there is no cuBLAS.
class Cublas {
 public:
  Cublas(const Device& device, void* workspace);
  void multiply(const Product& p) const;

 private:
  void* handle_;
};

}  // namespace widehead::cuda
