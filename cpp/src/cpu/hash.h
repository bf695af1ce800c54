// hash.h -- what the hash kernels take: rows in groups of a vector's lanes, coordinate by coordinate
#pragma once
#include <cstdint>

#include "widehead/view.h"

namespace widehead::cpu {

// What the codes look at, drawn once.
struct HashFunctions {
  int family;                   // HashFamily
  std::int64_t features;        // coordinates, the bias's among them
  std::int64_t tables, hashes;  // hashes a table
  std::int64_t window;          // coordinates a code: not above `features`
  int bits;                     // a code
  const std::int32_t* places;   // [tables, hashes, window]: wta, dwta
  const float* signs;           // [features, padded codes], +-1: simhash
  std::int64_t padded;          // codes rounded up to 8
  std::uint64_t seed;
};

constexpr std::uint32_t kNoKey = ~0u;

// Rows [first, first + n) of `rows`, or rows ids[first ...] of it.
struct HashRows {
  const HashFunctions* functions;
  ConstAnyMatrix rows;
  ConstAnyVector bias;  // or empty: 1
  bool has_bias;
  const std::int64_t* ids;  // or null
  std::int64_t first, n;
  std::uint32_t* keys;  // row i, table t at keys[t * stride + i]; kNoKey: in no table
  std::int64_t stride;
  float* margins;  // or null: by how much each code was decided, [n, tables, hashes]; the second best code in `seconds`
  std::uint8_t* seconds;  // [n, tables, hashes]
};

struct HashKernels {
  std::int64_t lanes;
  // scratch: hash_scratch() floats
  void (*rows)(const HashRows&, float* scratch);
};

inline std::int64_t hash_scratch(const HashFunctions& f, std::int64_t lanes) {
  return (f.features + 3 * f.tables * f.hashes + 8 + f.tables) * lanes;
}

}  // namespace widehead::cpu
