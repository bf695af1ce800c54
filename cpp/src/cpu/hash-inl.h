// hash-inl.h -- keys of rows: as many rows at a time as a vector has lanes, so that no code needs a comparison across lanes
#pragma once
#include "cpu/hash.h"
#include "cpu/matmul-inl.h"
#include "widehead/hash_index.h"
#include "widehead/random.h"

namespace widehead::cpu::WIDEHEAD_ISA_NAME {

constexpr int kHashLanes = Simd<float>::kLanes;

inline float hash_element(const ConstAnyMatrix& m, i64 at) {
  switch (m.dtype) {
    case Dtype::f64: return static_cast<float>(static_cast<const double*>(m.data)[at]);
    case Dtype::bf16: return bf16_float(static_cast<const uint16_t*>(m.data)[at]);
    case Dtype::f16: return f16_float(static_cast<const uint16_t*>(m.data)[at]);
    default: return static_cast<const float*>(m.data)[at];
  }
}

// The group's coordinates as [features][lanes]; lanes past the last row repeat it.
inline void load_group(const HashRows& p, i64 at, float* tile) {
  const i64 width = p.rows.cols;
  i64 row[kHashLanes];
  for (i64 lane = 0; lane < kHashLanes; ++lane) {
    const i64 i = p.first + at_most(at + lane, p.n - 1);
    row[lane] = p.ids ? p.ids[i] : i;
  }
  i64 k = 0;
  if (p.rows.dtype == Dtype::f32 && !p.ids && at + kHashLanes <= p.n) {
    const float* from = static_cast<const float*>(p.rows.data) + row[0] * p.rows.stride;
    for (; k + kHashLanes <= width; k += kHashLanes)
      transpose_square(from + k, p.rows.stride, tile + k * kHashLanes, kHashLanes);
  }
  for (i64 lane = 0; lane < kHashLanes; ++lane)
    for (i64 j = k; j < width; ++j) tile[j * kHashLanes + lane] = hash_element(p.rows, row[lane] * p.rows.stride + j);
  if (!p.has_bias) return;
  const ConstAnyMatrix bias{p.bias.data, p.bias.dtype, p.bias.size, 1, 1};
  for (i64 lane = 0; lane < kHashLanes; ++lane)
    tile[width * kHashLanes + lane] = p.bias.data ? hash_element(bias, row[lane]) : 1.0f;
}

// All ones in the lanes of rows that can be hashed.
inline Words sound_lanes(const float* tile, i64 features) {
  Words bad{};
  for (i64 k = 0; k < features; ++k) {
    const Vec<float> x = load(tile + k * kHashLanes);
    bad |= (Words)(x != x);
  }
  return ~bad;
}

// The largest of a window's coordinates, the first of equals, and the second best with its distance.
WIDEHEAD_INLINE Words largest_of(const float* tile, const int32_t* places, i64 window) {
  Vec<float> best = load(tile + places[0] * kHashLanes);
  Words code{};
  for (i64 j = 1; j < window; ++j) {
    const Vec<float> x = load(tile + places[j] * kHashLanes);
    const Words wins = (Words)(x > best);
    best = x > best ? x : best;
    code = (wins & splat(static_cast<uint32_t>(j))) | (~wins & code);
  }
  return code;
}

inline void second_of(const float* tile, const int32_t* places, i64 window, const uint32_t* codes, float* margins,
                      uint32_t* seconds) {
  for (int lane = 0; lane < kHashLanes; ++lane) {
    const float best = tile[places[codes[lane]] * kHashLanes + lane];
    float next = -__builtin_inff();
    uint32_t at = codes[lane];
    for (i64 j = 0; j < window; ++j) {
      const float x = tile[places[j] * kHashLanes + lane];
      if (j == codes[lane] || !(x > next)) continue;
      next = x;
      at = static_cast<uint32_t>(j);
    }
    margins[lane] = best - next;
    seconds[lane] = at;
  }
}

// As largest_of, of coordinates that are not zero; `found` says where there is one.
WIDEHEAD_INLINE Words largest_nonzero(const float* tile, const int32_t* places, i64 window, Words& found) {
  Vec<float> best{};
  Words code{};
  found = Words{};
  for (i64 j = 0; j < window; ++j) {
    const Vec<float> x = load(tile + places[j] * kHashLanes);
    const Words wins = (Words)(x != Vec<float>{}) & (~found | (Words)(x > best));
    best = (Vec<float>)((wins & (Words)x) | (~wins & (Words)best));
    code = (wins & splat(static_cast<uint32_t>(j))) | (~wins & code);
    found |= wins;
  }
  return code;
}

// Windows without a code take one of the same row's. False where no window has one.
inline bool borrow_codes(const HashFunctions& f, uint32_t* codes, const uint32_t* found, int lane) {
  const i64 n = f.tables * f.hashes;
  bool any = false, all = true;
  for (i64 c = 0; c < n; ++c) {
    any = any || found[c * kHashLanes + lane];
    all = all && found[c * kHashLanes + lane];
  }
  if (!any || all) return any;
  const RandomStream random{f.seed, Purpose::hashing, 0};
  for (i64 c = 0; c < n; ++c) {
    if (found[c * kHashLanes + lane]) continue;
    uint32_t attempt = 0;
    i64 from;
    do
      from =
          static_cast<i64>(random.below(static_cast<uint64_t>(n), (1ull << 41) + static_cast<uint64_t>(c), attempt++));
    while (!found[from * kHashLanes + lane]);
    codes[c * kHashLanes + lane] = codes[from * kHashLanes + lane];
  }
  return true;
}

// Signs of eight products at a time; each sum goes through the coordinates in their order.
inline void sign_codes(const HashFunctions& f, const float* tile, uint32_t* codes, float* sums) {
  const i64 n = f.tables * f.hashes;
  for (i64 c = 0; c < n; c += 8) {
    Vec<float> sum[8] = {};
    for (i64 k = 0; k < f.features; ++k) {
      const Vec<float> x = load(tile + k * kHashLanes);
      const float* sign = f.signs + k * f.padded + c;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] += x * sign[j];
    }
    for (i64 j = 0; j < at_most(8, n - c); ++j) {
      store(reinterpret_cast<float*>(codes + (c + j) * kHashLanes), (Vec<float>)((Words)(sum[j] > Vec<float>{}) & 1u));
      if (sums) store(sums + (c + j) * kHashLanes, sum[j]);
    }
  }
}

inline void hash_group(const HashRows& p, i64 at, float* scratch) {
  const HashFunctions& f = *p.functions;
  const i64 n = f.tables * f.hashes;
  const auto family = static_cast<HashFamily>(f.family);
  float* tile = scratch;
  uint32_t* codes = reinterpret_cast<uint32_t*>(tile + f.features * kHashLanes);
  uint32_t* others = codes + n * kHashLanes;
  float* margins = reinterpret_cast<float*>(others + n * kHashLanes);
  load_group(p, at, tile);
  Words sound = sound_lanes(tile, f.features);
  const auto put = [](uint32_t* to, Words w) { store(reinterpret_cast<float*>(to), (Vec<float>)w); };
  if (family == HashFamily::simhash) {
    sign_codes(f, tile, codes, p.margins ? margins : nullptr);
  } else {
    for (i64 c = 0; c < n; ++c) {
      const int32_t* places = f.places + c * f.window;
      if (family == HashFamily::wta) {
        put(codes + c * kHashLanes, largest_of(tile, places, f.window));
      } else {
        Words found;
        put(codes + c * kHashLanes, largest_nonzero(tile, places, f.window, found));
        put(others + c * kHashLanes, found);
      }
    }
    if (family == HashFamily::dwta)
      for (int lane = 0; lane < kHashLanes; ++lane)
        if (!borrow_codes(f, codes, others, lane)) sound[lane] = 0;
  }
  const i64 rows = at_most(kHashLanes, p.n - at);
  for (i64 t = 0; t < f.tables; ++t) {
    Words key{};
    for (i64 j = 0; j < f.hashes; ++j)
      key |= load(codes + (t * f.hashes + j) * kHashLanes) << static_cast<int>(j * f.bits);
    key = (key & sound) | ~sound;
    for (i64 lane = 0; lane < rows; ++lane) p.keys[t * p.stride + at + lane] = key[lane];
  }
  if (!p.margins) return;
  for (i64 c = 0; c < n; ++c) {
    uint32_t* second = others + c * kHashLanes;
    float* margin = margins + c * kHashLanes;
    if (family == HashFamily::simhash) {
      for (int lane = 0; lane < kHashLanes; ++lane) {
        margin[lane] = __builtin_fabsf(margin[lane]);
        second[lane] = 1 - codes[c * kHashLanes + lane];
      }
    } else {
      second_of(tile, f.places + c * f.window, f.window, codes + c * kHashLanes, margin, second);
    }
    for (i64 lane = 0; lane < rows; ++lane) {
      p.margins[(at + lane) * n + c] = margin[lane];
      p.seconds[(at + lane) * n + c] = static_cast<uint8_t>(second[lane]);
    }
  }
}

inline void hash_rows(const HashRows& p, float* scratch) {
  for (i64 at = 0; at < p.n; at += kHashLanes) hash_group(p, at, scratch);
}

inline HashKernels hash_table() { return {kHashLanes, hash_rows}; }

}  // namespace widehead::cpu::WIDEHEAD_ISA_NAME
