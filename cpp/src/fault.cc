// fault.cc -- the record of a bad value on the device as an exception
#include "widehead/fault.h"

#include <string>

#include "widehead/error.h"

namespace widehead {

const char* name_of(Argument argument) {
  switch (argument) {
    case Argument::hidden: return "hidden";
    case Argument::lse: return "lse";
    case Argument::grad_losses: return "grad_losses";
    case Argument::grad_output: return "grad_output";
    case Argument::grad_lse: return "grad_lse";
    case Argument::classes: return "classes";
    case Argument::rows: return "rows";
    case Argument::grad: return "grad";
    case Argument::grad_bias: return "grad_bias";
    case Argument::exclude: return "exclude";
    case Argument::index: return "index";
    case Argument::batch: return "batch";
    case Argument::weight: return "weight";
    case Argument::velocity: return "velocity";
    case Argument::grad_A: return "grad_A";
    case Argument::grad_q: return "grad_q";
    case Argument::grad_s: return "grad_s";
    case Argument::lr: return "lr";
    case Argument::grad_scale: return "grad_scale";
    case Argument::column_scale: return "column_scale";
    default: return "target";
  }
}

void raise_fault(const FaultRecord& r) {
  using std::to_string;
  const std::string name = std::string(name_of(static_cast<Argument>(r.argument))) + ": ";
  const std::string at = " at position " + to_string(r.position);
  switch (static_cast<Fault>(r.fault)) {
    case Fault::none: return;
    case Fault::label_range:
      throw LabelError(name + "label " + to_string(r.value) + at + " is out of range: expected 0 to " +
                       to_string(r.limit - 1) + ", or the ignore_index of single-label targets");
    case Fault::label_repeated:
      throw LabelError(name + "label " + to_string(r.value) + at +
                       " is there twice: the labels of a row must be distinct");
    case Fault::row_pointer:
      throw LabelError(name + "row pointer " + to_string(r.value) + " of row " + to_string(r.position) +
                       " decreases or lies outside of 0 to " + to_string(r.limit));
    case Fault::label_weight: throw LabelError(name + "the weight of the label" + at + " must be finite");
    case Fault::row_range:
      throw LabelError(name + "expected a class in [0, " + to_string(r.limit) + "), got " + to_string(r.value) + at);
    case Fault::row_repeated: throw LabelError(name + "expected distinct rows, got " + to_string(r.value) + " twice");
    case Fault::row_order:
      throw LabelError(name + "expected ascending rows, padding last, got " + to_string(r.value) + " after " +
                       to_string(r.limit) + at);
    case Fault::index_range:
      throw ShapeError(name + "expected inputs in [0, " + to_string(r.limit) + "), got " + to_string(r.value) +
                       " at row " + to_string(r.position));
    case Fault::index_order:
      throw ShapeError(name + "expected distinct inputs in ascending order, got " + to_string(r.limit) + " before " +
                       to_string(r.value) + " in row " + to_string(r.position));
    case Fault::stale_batch:
      throw Error(name + "the weights have taken a step since this batch's forward pass, or it had no backward pass");
    case Fault::log_full:
      throw CapacityError(name + "the exact head has taken " + to_string(r.value) + " steps of at most " +
                          to_string(r.limit - 1) + " since its rows were last brought together: call consolidate()");
    default:
      throw NonFiniteError(name + "expected finite numbers, got NaN or infinity in row " + to_string(r.position));
  }
}

}  // namespace widehead
