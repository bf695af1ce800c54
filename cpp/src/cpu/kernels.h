// kernels.h -- what an instruction-set unit offers: plain functions over plain structs, one table a unit
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/bag.h"
#include "cpu/hash.h"
#include "cpu/hashed.h"
#include "cpu/matmul.h"
#include "widehead/loss.h"
#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead::cpu {

using i64 = std::int64_t;

// A target of the batch; targets are sorted by class, then by row.
struct Entry {
  i64 cls;
  i64 row;
  float value;
};

// What the tiles of one call share. Memory belongs to the driver (driver.h).
struct DenseContext {
  // A sparse layer's inputs, [groups, fan_in]; null: dense, every class has all features.
  const void* index;
  Dtype index_dtype;  // u16 | i32
  i64 fan_in, index_stride, group_size;

  const void* hidden;
  Dtype hidden_dtype;
  i64 batch, features, hidden_stride;
  void* weight;
  Dtype weight_dtype;
  i64 classes, weight_stride;
  void* bias;  // null: none
  Dtype bias_dtype;
  const float* offset;
  LossOptions loss;
  const Entry* entries;
  i64 n_entries;
  void* entry_logits;  // [n_entries] Real, scratch

  void* packed_columns;  // hidden as [block][batch panel][feature][panel]: the right-hand side of z = W h
  void* packed_rows;     // hidden as [block][feature panel][example][panel]: the right-hand side of dW = g^T H
  const void* lse;       // [padded batch] Real
  const void*
      p_scale;  // [padded batch] Real: softmax, dL/dz = p_scale p - e_scale w_c (- targets); else the gradient of the loss
  const void* e_scale;        // [padded batch] Real
  const double* grad_losses;  // [batch]
  const double* grad_output;  // [batch]
  double filter_below;        // softmax: skip a tile whose |dL/dz| all stay below this; 0: off
};

// Sizes that depend on the unit, the dtype of the weights and the shape.
struct DenseGeometry {
  i64 panel;         // lanes of a batch panel
  i64 tile;          // classes a tile
  i64 block;         // examples a block; a multiple of panel
  i64 padded_batch;  // multiple of panel and of the packing factor
  i64 blocks;
  i64 real_bytes;
  bool
      feature_major;  // dH accumulates as [batch panel][feature][panel]; else as [block][feature panel][example][panel]
  std::size_t partial_bytes;  // what the partitions keep apart may take this much in all, as far as their number allows
  std::size_t columns_bytes, rows_bytes;          // of the packed batch
  std::size_t grad_bytes;                         // one [padded_batch, padded features] accumulator, in panels
  std::size_t forward_scratch, backward_scratch;  // per running task
};

// Partial results of one partition of the classes, each [padded_batch]; the arrays of Real come zeroed, row_max at the lowest number.
struct ForwardPartial {
  void* row_max;
  void* row_sum;
  void* row_lost;  // compensation of row_sum (Kahan)
  void* row_aux;   // softmax with smoothing: sum_c w_c z_c; bce, hinge: the loss as if nothing were a target
  void* row_aux_lost;
  double* output;  // [batch] sum of y z over the targets
  double* adjust;  // [batch] softmax: sum of y w z over the targets; bce, hinge: what the targets change in the loss
};

struct BackwardTask {
  i64 first_tile, end_tile;
  i64 first_block, end_block;
  void* grad_hidden;       // accumulator or null
  AnyMatrix grad_weight;   // or empty
  AnyVector grad_bias;     // or empty
  const Update* update;    // or null: the step
  bool want_weight;        // gradient of the weights is needed (grad_weight or update)
  ForwardPartial* losses;  // or null: bce and hinge compute them on the way
  i64 filtered;
};

struct TopKTask {
  i64 first_tile, end_tile;
  i64 k;
  void* scores;  // [batch, k] Real
  i64* classes;  // [batch, k]
  i64* filled;   // [batch]
  const i64* exclude_indptr;
  const i64* exclude_sorted;
  ForwardPartial* lse;  // or null
};

// What the driver (driver.h) runs: a set for the dense head, one for the sparse head.
struct HeadKernels {
  DenseGeometry (*geometry)(const DenseContext&);
  void (*pack_columns)(const DenseContext&, const DenseGeometry&, i64 block);
  void (*pack_rows)(const DenseContext&, const DenseGeometry&, i64 block);
  void (*forward)(const DenseContext&, const DenseGeometry&, i64 first_tile, i64 end_tile, ForwardPartial&,
                  void* scratch);
  void (*backward)(const DenseContext&, const DenseGeometry&, BackwardTask&, void* scratch);
  void (*topk)(const DenseContext&, const DenseGeometry&, TopKTask&, void* scratch);
  void (*logits)(const DenseContext&, const DenseGeometry&, i64 first_tile, i64 end_tile, AnyMatrix out, void* scratch);
  // scores[b, j] for rows [first, end) of the batch.
  void (*scores)(const DenseContext&, i64 first, i64 end, const i64* classes, i64 n, AnyMatrix out);
};

struct UpdateKernels {
  // One optimiser step of row `row` of `weight` (n elements) with gradient g (float32; float64 for float64 weights).
  void (*row)(const Update&, AnyMatrix weight, i64 row, const void* g);
  // The same for elements [first, first + n) of the bias.
  void (*bias)(const Update&, AnyVector bias, i64 first, i64 n, const void* g);
};

struct Kernels {
  const char* name;
  HeadKernels dense;
  HeadKernels sparse;
  UpdateKernels update;
  BagKernels bag;
  ProductKernels product;
  HashKernels hash;
  HashedKernels hashed;
};

const Kernels& kernels();  // of the current unit

namespace scalar {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}

}  // namespace widehead::cpu
