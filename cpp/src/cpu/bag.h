// bag.h -- what the kernels of the embedding bag take: checked arguments, cut into ranges by the caller
#pragma once
#include <cstdint>

#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead::cpu {

struct BagForwardPlan {
  const std::int64_t* indptr;
  const void* indices;
  bool wide;  // int64 indices
  const float* values;
  ConstAnyMatrix table;
  bool normalise;
  double scale;
  AnyMatrix out;
  void* norms;
};

// dL/ds from dL/dout: G = scale / |s| (g - u (u . g)) with u = out / scale.
struct BagGradientPlan {
  ConstAnyMatrix out;
  const void* norms;
  double scale;
  ConstAnyMatrix grad;
  void* sums;  // [B, d] contiguous
};

// The transposed batch: touched row features[s] gets entries segments[s] .. segments[s + 1].
struct BagStepPlan {
  const std::int64_t* segments;
  const std::uint32_t* features;
  const std::uint32_t* examples;  // [nnz]
  const float* values;            // [nnz] or null
  std::int64_t touched;
  AnyMatrix table;
  ConstAnyMatrix grad;  // [B, d] dL/ds
  const Update* update;
};

struct BagKernels {
  void (*forward)(const BagForwardPlan&, std::int64_t begin, std::int64_t end);    // examples
  void (*gradient)(const BagGradientPlan&, std::int64_t begin, std::int64_t end);  // examples
  // Segments; scratch holds d float64.
  void (*step)(const BagStepPlan&, std::int64_t begin, std::int64_t end, void* scratch);
};

}  // namespace widehead::cpu
