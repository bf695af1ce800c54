// sparse_lists.h -- who reads an input: the index of a tile of classes, transposed on the GPU at every step
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "widehead/sparse.h"

namespace widehead::cuda {

// The index as kernels take it.
struct SparseInputs {
  const void* data = nullptr;
  bool wide = false;  // int32, else uint16
  i64 stride = 0, group_size = 1;
  std::uint32_t fan_in = 0, last = 0;  // last: the last feature

  SparseInputs() = default;
  SparseInputs(const SparseIndex& index, i64 k, i64 features)
      : data(index.data),
        wide(index.dtype == Dtype::i32),
        stride(index.stride),
        group_size(index.group_size),
        fan_in(static_cast<std::uint32_t>(k)),
        last(static_cast<std::uint32_t>(features - 1)) {}

  // Always a feature: an index that was never checked gives wrong numbers, but does not lead out of memory.
  __device__ inline int at(i64 cls, i64 k) const { return of_row(group_size == 1 ? cls : cls / group_size, k); }
  __device__ inline int of_row(i64 row, i64 k) const {
    const i64 i = row * stride + k;
    const std::uint32_t h = wide ? static_cast<std::uint32_t>(static_cast<const std::int32_t*>(data)[i])
                                 : static_cast<const std::uint16_t*>(data)[i];
    return static_cast<int>(h < last ? h : last);
  }
};

// Rows of the index as classes of their own.
inline SparseInputs rows_of(SparseInputs inputs) {
  inputs.group_size = 1;
  return inputs;
}

// Of input h: entries[starts[h] .. starts[h + 1]), ascending, each class * fan_in + k with the class counted from the
// tile's first.
struct ListView {
  const int* starts;  // [features + 1]
  const std::uint32_t* entries;
  i64 features;
};

// Classes of a tile at most, so that its entries can be numbered.
inline i64 most_listed_classes(i64 fan_in) { return at_least(1, (i64{1} << 28) / fan_in); }

class SparseLists {
 public:
  SparseLists() = default;
  SparseLists(i64 features, i64 tile, i64 fan_in, Scratch& scratch);

  // Once a call.
  void begin(const Device& device) const;
  // The lists of classes [first, first + count).
  void build(const Device& device, const SparseInputs& inputs, i64 first, i64 count) const;
  ListView view() const { return {starts_, entries_, features_}; }

 private:
  i64 features_ = 0;
  int *counts_ = nullptr, *starts_ = nullptr, *parts_ = nullptr, *ranks_ = nullptr;
  std::uint32_t* entries_ = nullptr;
};

}  // namespace widehead::cuda
