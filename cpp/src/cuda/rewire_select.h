// rewire_select.h -- which connections of a sparse layer are the weakest
#pragma once
#include <cuda_runtime.h>

#include "cuda/convert.h"
#include "cuda/launch.h"
#include "rewire_math.h"
#include "widehead/rewire.h"

namespace widehead::cuda {

// Everything below `bits` goes, and of those equal to it the first `ties` in order of row and input.
struct Cut {
  std::uint32_t bits = 0;
  i64 ties = 0;
};

// Rows of the index that are walked in order by one block.
constexpr i64 kChunkRows = 32;
inline i64 index_rows(const Rewire& args) { return ceil_div(args.weight.rows, args.group_size); }

__device__ inline std::uint32_t strength(const Rewire& args, i64 row, i64 k) {
  const i64 first = row * args.group_size, end = at_most(args.weight.rows, first + args.group_size);
  double sum = 0;  // in the order of the classes, as on the CPU
  for (i64 c = first; c < end; ++c)
    sum += fabs(number_at<double>(args.weight.data, args.weight.dtype, c * args.weight.stride + k));
  return strength_bits(sum, end - first);
}

// Nothing is done where the step was refused.
__device__ inline bool is_refused(const Rewire& args) { return args.device.refused && *args.device.refused; }

struct SelectScratch {
  unsigned long long* counts;  // of the connections in each bin
  Cut* cut;
  i64* ties_before;  // of the cut before each chunk of rows
};
SelectScratch take_select_scratch(Scratch& scratch, const Rewire& args);
// Finds the cut for the `wanted` weakest of all, 1 at least, and its ties.
void select_weakest(const Rewire& args, i64 wanted, const SelectScratch& scratch);

}  // namespace widehead::cuda
