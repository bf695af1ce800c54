// dense_batch.h -- what every way through a head needs first: checked targets; hidden in the dense weights' type
#pragma once
#include "cuda/convert.h"
#include "cuda/dense_rows.h"

namespace widehead::cuda {

// Checked targets, and the flag that refuses the call.
class BatchTargets {
 public:
  BatchTargets(i64 rows, const LossOptions& loss, const Device& device, Scratch& scratch)
      : targets(scratch.take<RowTargets>(rows)), loss_(loss), device_(device) {
    refused_ = scratch.take<std::int32_t>(1);
    if (loss.label_smoothing > 0) {
      weight_sum = scratch.take<double>(1);
      parts_ = scratch.take<double>(kSumParts);
    }
  }

  void begin(const Labels& target) {
    if (!device_.refused)
      WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(refused_, 0, sizeof *refused_, static_cast<cudaStream_t>(device_.stream)));
    prepare_targets(device_, target, loss_, report(), targets);
    if (weight_sum) sum_class_weights(device_, loss_.class_weight, target.n_classes, parts_, weight_sum);
  }

  Report report() const { return {device_.faults, device_.refused ? device_.refused : refused_}; }

  RowTargets* targets;
  double* weight_sum = nullptr;  // with label smoothing

 private:
  const LossOptions& loss_;
  const Device& device_;
  std::int32_t* refused_ = nullptr;
  double* parts_ = nullptr;
};

// The factors of the dense head's products.
template <class W>
class Factors {
 public:
  Factors(const DenseLayer& layer, const Device& device, Scratch& scratch) : layer_(layer), device_(device) {
    hidden_ = layer.hidden;
    if (layer.hidden.dtype == layer.weight.dtype) return;
    converted_ = take_converted(scratch, layer.hidden, layer.hidden.rows, layer.weight.dtype);
    hidden_ = {converted_, layer.weight.dtype, layer.hidden.rows, layer.hidden.cols,
               converted_stride(layer.hidden.cols, layer.weight.dtype)};
  }

  void convert() {
    if (converted_) as_factor(device_, layer_.hidden, 0, layer_.hidden.rows, layer_.weight.dtype, converted_);
  }

  // As products take it, once converted.
  const ConstAnyMatrix& factor() const { return hidden_; }
  const W* hidden(i64 row) const { return static_cast<const W*>(hidden_.data) + row * hidden_.stride; }
  i64 hidden_stride() const { return hidden_.stride; }
  const W* weight(i64 row) const { return static_cast<const W*>(layer_.weight.data) + row * layer_.weight.stride; }

 private:
  const DenseLayer& layer_;
  const Device& device_;
  ConstAnyMatrix hidden_;
  void* converted_ = nullptr;  // where hidden's type is not the weights'
};

template <class W>
class Batch : public BatchTargets, public Factors<W> {
 public:
  Batch(const DenseLayer& layer, const LossOptions& loss, const Device& device, Scratch& scratch)
      : BatchTargets(layer.hidden.rows, loss, device, scratch), Factors<W>(layer, device, scratch) {}

  void begin(const Labels& target) {
    BatchTargets::begin(target);
    this->convert();
  }
};

inline AnyMatrix writable(const ConstAnyMatrix& m) {
  return {const_cast<void*>(m.data), m.dtype, m.rows, m.cols, m.stride};
}
inline AnyVector writable(const ConstAnyVector& v) { return {const_cast<void*>(v.data), v.dtype, v.size}; }
inline AnyMatrix rows_of(const AnyMatrix& m, i64 first, i64 count) {
  return {static_cast<char*>(m.data) + first * m.stride * size_of(m.dtype), m.dtype, count, m.cols, m.stride};
}
// Elements [first, first + count) as one row.
inline AnyMatrix slice_of(const AnyVector& v, i64 first, i64 count) {
  return {static_cast<char*>(v.data) + first * size_of(v.dtype), v.dtype, 1, count, count};
}

}  // namespace widehead::cuda
