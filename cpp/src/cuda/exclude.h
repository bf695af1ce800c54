// exclude.h -- classes that must not appear among an example's best: row pointers checked, hash tables filled and asked
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/fault.h"
#include "cuda/launch.h"
#include "cuda/topk.h"
#include "widehead/dense.h"

namespace widehead::cuda {

constexpr int kExcludeThreads = 256, kExcludeWarps = kExcludeThreads / 32;

// Of each row a hash table with two places an index, one behind the other as the row pointers say.
struct Excluded {
  const i64* indptr = nullptr;  // null: nothing is excluded
  std::uint32_t* table = nullptr;
  const std::int32_t* bad = nullptr;  // not zero: some row pointer is bad, and nothing is excluded

  struct Row {
    std::uint32_t* table;
    std::uint64_t places;
    __device__ inline std::uint64_t first(std::uint32_t cls) const { return cls * 2654435769u * places >> 32; }
    __device__ inline std::uint64_t next(std::uint64_t i) const { return i + 1 == places ? 0 : i + 1; }
  };
  __device__ inline Row row(i64 b) const {
    const i64 begin = indptr[b];
    return {table + 2 * begin, static_cast<std::uint64_t>(2 * (indptr[b + 1] - begin))};
  }
  __device__ inline bool contains(i64 b, std::uint32_t cls) const {
    if (!indptr || *bad) return false;
    const Row r = row(b);
    if (r.places == 0) return false;
    for (std::uint64_t i = r.first(cls); r.table[i] != kNoClass; i = r.next(i))
      if (r.table[i] == cls) return true;
    return false;
  }
};

namespace {

__global__ void check_row_pointers(const i64* indptr, i64 rows, i64 size, std::int32_t* bad, Report report) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 b = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; b < rows; b += step) {
    const i64 begin = indptr[b], end = indptr[b + 1];
    if (begin >= 0 && begin <= end && end <= size) continue;
    *bad = 1;
    report(Fault::row_pointer, Argument::exclude, b, begin < 0 ? begin : end, size);
  }
}

// A warp takes every gridDim.y-th 32 indices of a row.
__global__ void fill_excluded(Excluded to, const i64* indices, i64 rows, i64 n_classes) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (*to.bad) return;
  const i64 step = static_cast<i64>(gridDim.x) * kExcludeWarps;
  for (i64 b = static_cast<i64>(blockIdx.x) * kExcludeWarps + warp; b < rows; b += step) {
    const Excluded::Row row = to.row(b);
    for (i64 i = to.indptr[b] + 32 * static_cast<i64>(blockIdx.y) + lane; i < to.indptr[b + 1]; i += 32 * gridDim.y) {
      if (indices[i] < 0 || indices[i] >= n_classes) continue;
      const auto cls = static_cast<std::uint32_t>(indices[i]);
      std::uint64_t at = row.first(cls);
      for (;; at = row.next(at)) {
        const std::uint32_t before = atomicCAS(row.table + at, kNoClass, cls);
        if (before == kNoClass || before == cls) break;
      }
    }
  }
}

// `table` has 2 exclude_size places.
Excluded exclude(const DenseTopK& args, std::uint32_t* table, std::int32_t* bad) {
  if (!args.exclude_indptr) return {};
  const Device& device = args.device;
  const i64 rows = args.layer.hidden.rows;
  const Excluded excluded{args.exclude_indptr, table, bad};
  const auto stream = static_cast<cudaStream_t>(device.stream);
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(bad, 0, sizeof(std::int32_t), stream));
  const Report report{device.faults, device.refused ? device.refused : bad};
  launch(device, blocks_for(rows, kExcludeThreads), kExcludeThreads, 0, check_row_pointers, args.exclude_indptr, rows,
         args.exclude_size, bad, report);
  if (args.exclude_size == 0) return excluded;
  const auto bytes = static_cast<std::size_t>(2 * args.exclude_size) * sizeof(std::uint32_t);
  WIDEHEAD_CUDA_CHECK(cudaMemsetAsync(table, 0xFF, bytes, stream));
  const dim3 grid(blocks_for(rows, kExcludeWarps), blocks_for(args.exclude_size / rows, 1024, 256));
  launch(device, grid, kExcludeThreads, 0, fill_excluded, excluded, args.exclude_indices, rows, args.layer.weight.rows);
  return excluded;
}

}  // namespace

}  // namespace widehead::cuda
