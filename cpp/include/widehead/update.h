// update.h -- how a fused step changes the weights: optimiser, rounding, state; shared by all heads
#pragma once
#include <cstdint>

#include "widehead/view.h"

namespace widehead {

enum class Optimizer : std::uint8_t { sgd, adam, adagrad };
enum class Rounding : std::uint8_t { nearest, stochastic, kahan };
const char* name_of(Optimizer optimizer);
const char* name_of(Rounding rounding);

// sgd      g += weight_decay w;  with momentum: m = momentum m + g, g = m;   w -= lr g          (torch.optim.SGD)
// adam     w -= lr weight_decay w;  m, v moments with bias correction;  w -= lr m^ / (sqrt(v^) + eps)  (torch.optim.AdamW)
// adagrad  v_row += mean(g_row^2);  w -= lr g / (sqrt(v_row) + eps)            one number of state a row
// An eps of 0 makes 0 / 0 = NaN of an element that has never had a gradient, as in torch.
// Moments are float32 (float64 for float64 weights). Rounding applies to 16-bit weights only; kahan keeps the lost bits
// in `compensation`, itself of the weights' type.
struct Update {
  Optimizer optimizer = Optimizer::sgd;
  Rounding rounding = Rounding::stochastic;
  double lr = 0.0;
  double momentum = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  std::uint64_t step = 1;  // counts from 1: bias correction and random numbers
  std::uint64_t seed = 0;
  std::int64_t first_row = 0;  // global row of row 0, so that shards draw the same numbers as the whole

  // GPU: numbers in device memory that take the place of lr and step, so that a captured graph reads them anew.
  const float* device_lr = nullptr;           // [1]
  const std::int64_t* device_step = nullptr;  // [1] steps done so far: this one is the next

  AnyMatrix first = {};         // [D, d] momentum, or Adam's first moment
  AnyMatrix second = {};        // [D, d] Adam's second moment; adagrad: [D, 1]
  AnyMatrix compensation = {};  // [D, d] bfloat16, kahan
  AnyVector bias_first = {};    // [D]
  AnyVector bias_second = {};   // [D]
};

}  // namespace widehead
