// sparse_groups.h -- products of groups of classes with the same inputs, gathered once, on tensor cores
#pragma once
#include "cuda/sparse_products.h"

namespace widehead::cuda {

// The groups of a tile of classes, the first and the last perhaps in part.
struct TileGroups {
  i64 first, count, first_group, groups;

  TileGroups(i64 first_, i64 count_, i64 size)
      : first(first_),
        count(count_),
        first_group(first_ / size),
        groups((first_ + count_ - 1) / size - first_group + 1) {}
};
// At most, in a tile of so many classes wherever it begins.
inline i64 most_groups(i64 tile, i64 size) { return ceil_div(at_least(1, tile) - 1, size) + 1; }

// Whether groups go through tensor cores: 16-bit weights, groups that fill a good part of a product's 16 rows.
inline bool groups_fit(const Device& device, Dtype weight, i64 group_size) {
  return size_of(weight) == 2 && group_size >= 8 && hardware(device.index).capability >= 80;
}

// See gather_logits and gather_grad_weight, which call them.
template <class W>
void group_logits(const Device& device, const SparseWeights<W>& s, const W* x, i64 rows, i64 first, i64 count, float* z,
                  i64 z_stride);
template <class W>
void group_grad_weight(const Device& device, const SparseWeights<W>& s, const W* x, const W* g, i64 first, i64 count,
                       float* to, i64 to_stride, bool accumulate);
// out [groups * fan_in, padded]: what the classes of each group give to its inputs.
template <class W>
void group_grad_hidden(const Device& device, const SparseWeights<W>& s, const W* g, i64 first, i64 count, float* out);

}  // namespace widehead::cuda
