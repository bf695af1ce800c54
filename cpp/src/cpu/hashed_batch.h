// hashed_batch.h -- a batch of the hashed head on the CPU
#pragma once
#include <vector>

#include "cpu/hashed.h"

namespace widehead::cpu {

// Pairs of examples and classes, sorted by example in `logits` and so on, by class in `segments` and so on.
class CpuHashedBatch final : public HashedBatch {
 public:
  std::int64_t examples() const override { return static_cast<std::int64_t>(indptr.size()) - 1; }
  std::int64_t pairs() const override { return indptr.back(); }
  std::int64_t rows() const override { return static_cast<std::int64_t>(classes.size()); }
  void copy_rows(std::int64_t* out) const override;

  bool wide = false;
  std::int64_t n_classes = 0, features = 0;
  std::vector<double> hidden64;
  std::vector<float> hidden32;
  std::vector<std::int64_t> indptr;  // [B + 1] places of an example
  std::vector<double> log_weights;   // by place: log of the weight in the normaliser
  std::vector<float> values;         // by place: y of a target, else 0
  std::vector<float> logits32;
  std::vector<double> logits64;
  std::vector<double> lse, mass;                // [B]; mass: sum of y
  std::vector<std::int64_t> classes, segments;  // [rows], [rows + 1]
  std::vector<std::uint32_t> by_class_example, by_class_place;
  std::vector<std::int64_t> parts;  // rows parts[t] .. parts[t + 1] are a task's

  HashedRows view(std::int64_t part, AnyMatrix weight, AnyVector bias) const;
};

// Fills all but logits and lse.
void make_sets(const HashedForward& args, CpuHashedBatch& batch);

}  // namespace widehead::cpu
