// dense_prepare.h -- targets and incoming gradients in the form the tiles want
#pragma once
#include <vector>

#include "cpu/kernels.h"
#include "widehead/dense.h"
#include "widehead/sparse.h"

namespace widehead::cpu {

struct RowTargets {
  double total = 0;     // sum of y over the targets
  double weighted = 0;  // sum of y w
  bool active = true;   // false: ignored
};

struct Prepared {
  std::vector<Entry> entries;  // of the layer's classes, counted from its first; sorted by class, then row
  std::vector<RowTargets> rows;
  std::vector<double> grad_losses, grad_output;  // [batch]; zero where ignored
  double class_weight_sum = 0;
  i64 n_classes = 0, first_class = 0;  // of all, and the layer's first
  bool part = false;

  Prepared() = default;
  // classes: that the layer holds.
  Prepared(const Labels& target, const LossOptions& loss, i64 classes);
  void take_gradients(const ConstAnyVector& losses, const ConstAnyVector& output);
  double largest_grad_loss() const;
};

DenseContext layer_context(const DenseLayer& layer, const LossOptions& loss);
DenseContext layer_context(const SparseLayer& layer, const LossOptions& loss);
// Element i as double; 0 where the vector is not given.
double element(const ConstAnyVector& v, i64 i);
// CSR indices with every row sorted; empty where indptr is null.
std::vector<i64> sorted_rows(const i64* indptr, const i64* indices, i64 rows);

}  // namespace widehead::cpu
