// fault.h -- recording a bad value from a kernel
#pragma once
#include <cuda_runtime.h>

#include "widehead/fault.h"

namespace widehead::cuda {

// Where a call's kernels report: the caller's record (or null), and the flag that turns the call into a no-op (null only
// where the call changes nothing).
struct Report {
  FaultRecord* record = nullptr;
  std::int32_t* refused = nullptr;

  // The first fault stays in the record until the caller clears it.
  __device__ inline void operator()(Fault fault, Argument argument, std::int64_t position, std::int64_t value,
                                    std::int64_t limit) const {
    if (refused) *refused = 1;
    if (!record) return;
    auto* at = reinterpret_cast<unsigned long long*>(&record->fault);
    if (atomicCAS(at, 0ull, static_cast<unsigned long long>(fault)) != 0) return;
    record->argument = static_cast<std::int64_t>(argument);
    record->position = position;
    record->value = value;
    record->limit = limit;
  }
};

}  // namespace widehead::cuda
