// loss.h -- the losses that the heads share
#pragma once
#include <cstdint>

namespace widehead {

enum class Loss : std::uint8_t { softmax, bce, squared_hinge };
const char* name_of(Loss loss);

// softmax        l = (1 - a) sum_j y_j w_j (lse - z_j) + a / D sum_c w_c (lse - z_c) + lse_penalty lse^2
// bce            l = sum_c w_c (log(1 + exp z_c) - y_c z_c)
// squared_hinge  l = sum_j w_j y_j max(0, 1 - z_j)^2 over targets + sum_c w_c max(0, 1 + z_c)^2 over the others
// with a the label smoothing, w the class weights (1 when absent) and y the weights of the targets.
struct LossOptions {
  Loss kind = Loss::softmax;
  double label_smoothing = 0.0;         // softmax, single-label
  double lse_penalty = 0.0;             // softmax
  double softcap = 0.0;                 // z becomes softcap * tanh(z / softcap); 0: off. softmax
  const float* class_weight = nullptr;  // [n_classes], of all classes where the layer holds a part
  std::int64_t ignore_index = -100;     // single-label
};

}  // namespace widehead
