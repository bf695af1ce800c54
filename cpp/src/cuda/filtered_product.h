// filtered_product.h -- products of a gradient tile G most of whose blocks are zero: those blocks cost nothing
//
//   dX [rows, d] (+)= G W      dW [count, d] (+)= G' X
//
// cuBLAS cannot leave out blocks that only the device knows. These kernels read the gradient kernel's flags, list the
// blocks that are left, and multiply those, 128 x 128 results a block on tensor cores. Where nothing is left out they are
// slower than cuBLAS; they are for the gradient filter.
#pragma once
#include "cuda/launch.h"

namespace widehead::cuda {

// A flag for every kFlagRows examples by kFlagColumns classes: 0, that part of G is zero.
constexpr int kFlagRows = 32, kFlagColumns = 128;

template <class W>
struct FilteredTile {
  const W* g;  // [rows, count], stride g_stride
  i64 g_stride, rows, count;
  const unsigned char* flags;  // [row flags, flag_stride]
  i64 flag_stride;
};

// Whether the kernels can take factors at these places and strides, and are worth it for an [m, d] result on the device.
bool filtered_product_fits(const Device& device, Dtype weight, const void* factor, i64 stride, i64 m, i64 d);

// c [rows, d] (+)= G factor, factor [count, d].
template <class W>
void filtered_rows(const Device& device, const FilteredTile<W>& tile, const W* factor, i64 stride, int d, float* c,
                   i64 c_stride, bool accumulate);
// c [count, d] (+)= G' factor, factor [rows, d].
template <class W>
void filtered_columns(const Device& device, const FilteredTile<W>& tile, const W* factor, i64 stride, int d, float* c,
                      i64 c_stride, bool accumulate);

}  // namespace widehead::cuda
