// rows.cu -- rows of a weight matrix: first weights, gather, optimiser steps, and draws of classes
#include "cuda/backend.h"
#include "widehead/error.h"
namespace widehead::cuda {
void gather_rows(const GatherRows&) { throw BackendError("to do"); }
void update_rows(const UpdateRows&) { throw BackendError("to do"); }
void sample_classes(const SampleClasses&) { throw BackendError("to do"); }
void init_uniform(const AnyMatrix&, double, double, std::uint64_t, std::int64_t, const Device&) {
  throw BackendError("to do");
}
}  // namespace widehead::cuda
