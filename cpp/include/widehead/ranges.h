// ranges.h -- one output layer whose classes lie in several: blocks of one head, or shards on several machines
//
// A layer with Labels::part holds the classes [first_class, first_class + rows) of n_classes. Targets and class weights are
// those of all classes; targets in other ranges count for what is said of the example (its labels' weights, whether it is
// ignored), not as positives here. With s the range and z its logits:
//
//   bce, squared hinge   losses and output of the whole are the sums of the ranges'.
//   softmax   forward gives lse_s = log sum_{c in s} exp z_c and the terms that are sums over classes:
//               losses_s = -(1 - a) sum_{j in s} y_j w_j z_j - a / D sum_{c in s} w_c z_c,   output_s = sum_{j in s} y_j z_j
//             The whole follows from their sums over the ranges and the joint J = log sum_s exp lse_s:
//               loss = sum_s losses_s + A J + lse_penalty J^2,   output = sum_s output_s - J sum_j y_j
//               A = (1 - a) sum_j y_j w_j + a / D sum_c w_c
//             join_softmax adds the terms of J.
//   backward  takes J as lse, and gradients to the whole's losses, output and lse; grad_weight and grad_bias are those
//             rows of the whole's, grad_hidden is the sum over the ranges.
#pragma once
#include <cstdint>

#include "widehead/labels.h"
#include "widehead/loss.h"
#include "widehead/view.h"

namespace widehead {

struct JoinSoftmax {
  Labels target = {};  // as the ranges had it
  LossOptions loss = {};
  ConstAnyVector lse = {};  // [B] joint, float32 | float64
  AnyVector losses = {};    // [B] or empty: in, the sum of the ranges' losses; out, those of the whole
  AnyVector output = {};    // [B] or empty; likewise
  Device device = {};
};
void join_softmax(const JoinSoftmax& args);
// Bytes of device.scratch that the call wants; 0 on the CPU.
std::int64_t scratch_bytes(const JoinSoftmax& args);

}  // namespace widehead
