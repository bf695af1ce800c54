// hashed.h -- what the kernels of the hashed head take
#pragma once
#include <cstdint>

#include "widehead/hashed.h"

namespace widehead::cpu {

// Some classes in a row, and the examples that look at each: class rows[r] has the pairs segments[r] .. segments[r + 1].
struct HashedRows {
  const std::int64_t* rows;
  const std::int64_t* segments;
  std::int64_t n;
  const std::uint32_t* examples;  // of each pair
  const std::uint32_t* places;    // of each pair among those sorted by example
  const void* hidden;             // [B, d] Real
  std::int64_t features;
  AnyMatrix weight;
  AnyVector bias;
};

struct HashedStep {
  const void* grads;     // by place, Real
  void* grad_hidden;     // [B, d] Real to add to, or null
  const Update* update;  // or null
  Drift* drift;          // or null
  std::int64_t* moved;   // rows that have drifted past the limit; room for all
  std::int64_t* n_moved;
  AnyMatrix grad_rows;  // of these rows, or empty
  AnyVector grad_bias;
};

struct HashedKernels {
  // logits[place] = w . h + b. scratch: d Real.
  void (*logits)(const HashedRows&, void* logits, void* scratch);
  // scratch: 3 d Real
  void (*step)(const HashedRows&, const HashedStep&, void* scratch);
};

}  // namespace widehead::cpu
