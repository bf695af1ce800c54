// exact_places.h -- rows grouped by their place in the log, and multiplied by the matrices from there to now
//
// Rows are listed by place in any order, since no row's result depends on its neighbours; a tile is a few rows of one
// place, which pass through all their matrices in shared memory.
#pragma once
#include "cuda/exact_product.h"
#include "cuda/exact_state.h"
#include "cuda/intrinsics.h"

namespace widehead::cuda {

constexpr int kListThreads = static_cast<int>(kChunk);

// A Source says: due(); items(); place(i), -1 for none; put(i, n): item i is n-th of the list; and, where kSkips,
// skips(chunk) of kChunk items.
//
// body(chunk) of those that are not skipped, by whole blocks. Few of many are left where there are many millions of
// classes, so a block looks at a number of them at once.
template <class Source, class Body>
__device__ inline void for_chunks(const Source& source, const Body& body) {
  __shared__ int found[kListThreads], count;
  const i64 chunks = ceil_div(source.items(), kChunk);
  if constexpr (!Source::kSkips) {
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) body(chunk);
  } else {
    const i64 span = at_most(kListThreads, ceil_div(chunks, gridDim.x));
    for (i64 first = blockIdx.x * span; first < chunks; first += gridDim.x * span) {
      __syncthreads();  // the last count has been read
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
      const i64 mine = first + threadIdx.x;
      if (threadIdx.x < span && mine < chunks && !source.skips(mine))
        found[atomicAdd(&count, 1)] = static_cast<int>(threadIdx.x);
      __syncthreads();
      for (int n = 0; n < count; ++n) body(first + found[n]);
    }
  }
}

template <class Source>
__global__ void __launch_bounds__(kListThreads) count_places(Source source, PlaceTable* table) {
  __shared__ unsigned counts[kPlaces];
  if (!source.due()) return;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kPlaces) counts[thread] = 0;
  __syncthreads();
  const i64 n = source.items();
  for_chunks(source, [&](i64 chunk) {
    const i64 i = chunk * kChunk + thread;
    const int place = i < n ? source.place(i) : -1;
    if (place >= 0) atomicAdd(counts + place, 1u);
  });
  __syncthreads();
  if (thread < kPlaces && counts[thread] > 0)
    atomicAdd(table->counts + thread, static_cast<unsigned long long>(counts[thread]));
}

// By one block; `rows` go into a tile.
template <int kCount>
__global__ void __launch_bounds__(kListThreads) cut_places(PlaceTable* table, int rows) {
  __shared__ i64 counts[kCount];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kPlaces) counts[thread] = static_cast<i64>(table->counts[thread]);
  __syncthreads();
  if (thread != 0) return;
  i64 start = 0, tile = 0;
  for (int p = 0; p < kPlaces; ++p) {
    table->starts[p] = start;
    table->next[p] = static_cast<unsigned long long>(start);
    table->tiles[p] = tile;
    start += counts[p];
    tile += ceil_div(counts[p], rows);
  }
  table->starts[kPlaces] = start;
  table->tiles[kPlaces] = tile;
}

template <class Source>
__global__ void __launch_bounds__(kListThreads) list_places(Source source, PlaceTable* table) {
  __shared__ unsigned counts[kPlaces];
  __shared__ unsigned long long starts[kPlaces];
  if (!source.due()) return;
  const int thread = static_cast<int>(threadIdx.x);
  const i64 n = source.items();
  for_chunks(source, [&](i64 chunk) {
    __syncthreads();  // the last chunk's starts have been read
    if (thread < kPlaces) counts[thread] = 0;
    __syncthreads();
    const i64 i = chunk * kChunk + thread;
    const int place = i < n ? source.place(i) : -1;
    const unsigned rank = place >= 0 ? atomicAdd(counts + place, 1u) : 0;
    __syncthreads();
    if (thread < kPlaces && counts[thread] > 0)
      starts[thread] = atomicAdd(table->next + thread, static_cast<unsigned long long>(counts[thread]));
    __syncthreads();
    if (place >= 0) source.put(i, static_cast<i64>(starts[place]) + rank);
  });
}

// Lists what a source has; the table is empty before.
template <class Source>
void group_by_place(const Device& device, const Source& source, i64 items, int tile_rows, PlaceTable* table) {
  const unsigned blocks = blocks_for(items, kChunk, 8 * hardware(device.index).processors);
  launch(device, blocks, kListThreads, 0, count_places<Source>, source, table);
  launch(device, 1, kListThreads, 0, cut_places<kPlaces>, table, tile_rows);
  launch(device, blocks, kListThreads, 0, list_places<Source>, source, table);
}
inline void clear(const Device& device, PlaceTable* table) {
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(table, 0, sizeof *table, static_cast<cudaStream_t>(device.stream)));
}

struct RowTile {
  i64 first;  // in its list
  int rows;
  int level, index;  // of the first matrix; level -1: none
  int owner = 0;     // for the job
};

// Tile number `tile` of the table.
__device__ inline RowTile tile_of(const PlaceTable& table, i64 tile, int rows) {
  int low = 0, high = kPlaces - 1;  // the last place that begins at or before the tile, of those that have tiles
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const i64 first = table.starts[low] + (tile - table.tiles[low]) * rows;
  const int n = static_cast<int>(at_most(rows, table.starts[low + 1] - first));
  return {first, n, low == 0 ? -1 : (low - 1) / kRadix, low == 0 ? 0 : (low - 1) % kRadix};
}

constexpr int kSlices = 4;  // of the depth of a product
template <class Factor>
constexpr int kColumnsOf = 16 / static_cast<int>(sizeof(Factor));  // of a thread
constexpr int kMostLanes = 128;

// x [kRows] from shared memory, four at a time where there are so many.
template <class Factor, int kRows>
__device__ inline void load_shared(const Factor* from, Factor (&x)[kRows]) {
  if constexpr (kRows % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      const auto four = *reinterpret_cast<const FourOf<Factor>*>(from + r);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[r + i] = four.x[i];
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = from[r];
  }
}

// A Job says: due(); time(); head (an ExactView); tiles(rows), of so many; tile(number, rows); load(tile, r, k);
// store(tile, r, k, x); done(tile, r); unit(tile), whether row r is a row of I, number own(tile, r), plus what load
// gives.
template <class Job, int kRows>
__global__ void __launch_bounds__(kSlices* kMostLanes, 1) advance_rows(Job job) {
  using Factor = typename Job::Factor;
  constexpr int kColumns = kColumnsOf<Factor>;
  if (!job.due()) return;
  const LogTime time = job.time();
  const i64 width = job.head.width;
  const auto columns = static_cast<int>(width);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lanes = threads / kSlices, lane = thread % lanes, slice = thread / lanes;
  const i64 share = ceil_div(width, kSlices);
  const i64 k_begin = at_most(width, slice * share), k_end = at_most(width, k_begin + share);
  const i64 tiles = job.tiles(kRows);
  for (i64 number = blockIdx.x; number < tiles; number += gridDim.x) {
    Factor* from = reinterpret_cast<Factor*>(dynamic_shared());
    Factor* to = from + width * kRows;  // element (r, k) at k kRows + r
    const RowTile tile = job.tile(number, kRows);
    __syncthreads();  // the last tile has been stored
    for (int i = thread; i < columns * kRows; i += threads) {
      const int r = i / columns, k = i % columns;
      from[k * kRows + r] = r < tile.rows ? job.load(tile, r, k) : Factor{0};
    }
    bool unit = job.unit(tile);
    for (int level = tile.level; level >= 0; --level) {
      const int index = level == tile.level ? tile.index : 0;
      if (level < tile.level && time.digit(level) == 0) continue;
      const Factor* const matrix = job.head.matrix(level, index);
      const bool beside = job.head.beside_identity(level, index);
      __syncthreads();
      for (i64 c0 = 0; c0 < width; c0 += lanes * kColumns) {
        Factor sums[kColumns][kRows] = {};
#pragma unroll 4
        for (i64 k = k_begin; k < k_end; ++k) {
          Factor m[kColumns], x[kRows];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const i64 c = c0 + lane + j * lanes;
            m[j] = c < width ? matrix[k * width + c] : Factor{0};
          }
          load_shared(from + k * kRows, x);
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[j][r] += m[j] * x[r];
        }
        for (int turn = 0; turn < kSlices; ++turn) {
          if (slice == turn)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              const i64 c = c0 + lane + j * lanes;
              if (c < width)
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                  Factor x = turn > 0 ? to[c * kRows + r] : beside ? from[c * kRows + r] : Factor{0};
                  if (turn == 0 && unit && r < tile.rows) x += matrix[job.own(tile, r) * width + c];
                  to[c * kRows + r] = x + sums[j][r];
                }
            }
          __syncthreads();
        }
      }
      unit = unit && beside;
      Factor* const other = from;
      from = to;
      to = other;
    }
    __syncthreads();
    for (int i = thread; i < columns * tile.rows; i += threads) {
      const int r = i / columns, k = i % columns;
      job.store(tile, r, k, from[k * kRows + r]);
    }
    if (thread < tile.rows) job.done(tile, thread);
  }
}

// `tiles`: about how many there may be.
template <class Job>
void launch_advance(const Device& device, const Job& job, i64 tiles) {
  using Factor = typename Job::Factor;
  const i64 width = job.head.width;
  const int rows = tile_rows(device, width, sizeof(Factor));
  const auto lanes = static_cast<unsigned>(at_most(kMostLanes, round_up(ceil_div(width, kColumnsOf<Factor>), 32)));
  const unsigned blocks = blocks_for(tiles, 1, 4 * hardware(device.index).processors);
  const auto bytes = static_cast<std::size_t>(2 * rows * width) * sizeof(Factor);
  if (rows == 1) return launch(device, blocks, kSlices * lanes, bytes, advance_rows<Job, 1>, job);
  launch(device, blocks, kSlices * lanes, bytes, advance_rows<Job, kTileRows>, job);
}

}  // namespace widehead::cuda
