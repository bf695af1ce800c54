// rewire.h -- dynamic sparsity: the weakest connections of a sparse layer move to other inputs
//
// The fan-in of every class stays exactly K, its inputs distinct and ascending: weights and optimiser state are carried
// along. A moved connection starts with weight 0 (or keeps its small value) and zeroed state. With a group-shared index a
// connection is a slot of a group; its strength is the mean of |weight| over the group's classes. Which inputs are drawn
// depends on (seed, step, global row of the index) alone: same bits for any number of threads, shards as the whole.
#pragma once
#include <cstdint>

#include "widehead/view.h"

namespace widehead {

// magnitude_global  the `fraction` of all connections with the smallest strength (arXiv 2306.03725)
// magnitude_row     the `fraction` of each row of the index, as SRigL (arXiv 2305.02299)
// threshold         all connections with a strength below `threshold`
// Ties go to the lower row, then the lower input, so that exactly the asked number moves.
enum class RewireMode : std::uint8_t { magnitude_global, magnitude_row, threshold };
const char* name_of(RewireMode mode);

struct Rewire {
  AnyMatrix weight = {};  // [D, K] float32 | bfloat16 | float64
  void* index = nullptr;  // [ceil(D / group_size), K] uint16 | int32
  Dtype index_dtype = Dtype::u16;
  std::int64_t index_stride = 0;
  std::int64_t group_size = 1;
  std::int64_t in_features = 0;
  AnyMatrix first = {};         // [D, K] state of the optimiser, each may be empty
  AnyMatrix second = {};        // [D, K]
  AnyMatrix compensation = {};  // [D, K]
  RewireMode mode = RewireMode::magnitude_global;
  double fraction = 0.1;   // in [0, 1]
  double threshold = 0.0;  // mode threshold
  bool keep_value = false;
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::int64_t first_row = 0;     // global row of the index's row 0
  std::int64_t* moved = nullptr;  // [1] or null, where the other arrays are: takes the number that moved
  Device device = {};
  const std::int64_t* device_step = nullptr;  // GPU: [1] in the place of step, so that nobody waits to read it
};

// Returns the number of connections that moved: round(fraction * connections), of all or of each row. A row whose classes
// have every input already has none to move to and keeps its own. Throws ShapeError and DtypeError before any change.
// A GPU moves the same ones, to the same inputs; the call only enqueues the work and returns -1. Nothing moves there
// where *device.refused is not 0.
std::int64_t rewire(const Rewire& args);
// Bytes of device.scratch that the call wants; 0 on the CPU.
std::int64_t scratch_bytes(const Rewire& args);

}  // namespace widehead
