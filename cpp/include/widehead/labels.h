// labels.h -- targets: one class an example, or a sparse row of classes with weights
#pragma once
#include <cstdint>

namespace widehead {

// Single-label when indptr is null: row r has the class indices[r], or none when that is the loss's ignore_index.
// Multi-label otherwise (CSR): row r has indices[indptr[r] .. indptr[r + 1]), distinct within a row, in any order.
struct Labels {
  const std::int64_t* indptr = nullptr;   // [rows + 1] or null
  const std::int64_t* indices = nullptr;  // [nnz]
  const float* values = nullptr;          // [nnz] weights, or null for 1
  std::int64_t rows = 0;
  std::int64_t n_classes = 0;
  std::int64_t size = 0;  // length of `indices`; only a GPU needs it, where indptr cannot be read
  // The layer holds the classes [first_class, first_class + its rows) of n_classes alone; see ranges.h.
  bool part = false;
  std::int64_t first_class = 0;

  // CPU only.
  std::int64_t nnz() const { return indptr ? indptr[rows] : rows; }
};

// Throws LabelError naming the first label that is out of range (its value, its position, the range), a row pointer that
// decreases, a repeated class in a row, or a weight that is not finite. `ignore_index` is legal in single-label targets.
void check_labels(const Labels& labels, std::int64_t ignore_index, const char* argument);

}  // namespace widehead
