// rows.cc -- gather rows of a weight matrix, and fill one with its first weights
#include "widehead/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cuda/backend.h"
#include "widehead/error.h"
#include "widehead/parallel.h"
#include "widehead/random.h"

namespace widehead {
namespace {

constexpr std::int64_t kElements = std::int64_t{1} << 16;  // a task's elements: enough to outweigh its start

std::string shape(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

void check_rows(const std::int64_t* rows, std::int64_t n, std::int64_t n_classes) {
  for (std::int64_t i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= n_classes)
      throw LabelError("rows: expected rows in [0, " + std::to_string(n_classes) + "), got " + std::to_string(rows[i]) +
                       " at position " + std::to_string(i));
}

// body(first, last) over ranges of rows, in parallel.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t cols, const Body& body) {
  const std::int64_t chunk = std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(1, cols));
  parallel_for((rows + chunk - 1) / chunk,
               [&](std::int64_t task) { body(task * chunk, std::min(rows, (task + 1) * chunk)); });
}

template <class T>
T rounded(double x) {
  return static_cast<T>(x);
}
template <>
bf16 rounded<bf16>(double x) {
  return {bf16_nearest(static_cast<float>(x))};
}

template <class T>
void fill_uniform(const AnyMatrix& out, double low, double high, std::uint64_t seed, std::int64_t first_row) {
  const RandomStream random{seed, Purpose::init_weight, 0};
  for_rows(out.rows, out.cols, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      T* row = static_cast<T*>(out.data) + r * out.stride;
      for (std::int64_t c = 0; c < out.cols; c += 4) {
        const Philox4 bits =
            random.block(static_cast<std::uint64_t>(first_row + r), static_cast<std::uint32_t>(c >> 2));
        for (std::int64_t j = c; j < std::min(c + 4, out.cols); ++j)
          row[j] = rounded<T>(low + (high - low) * (static_cast<double>(bits.v[j - c] >> 8) * 0x1.0p-24));
      }
    }
  });
}

}  // namespace

void gather_rows(const GatherRows& args) {
  if (args.out.dtype != args.weight.dtype)
    throw DtypeError("out: expected " + std::string(name_of(args.weight.dtype)) + " as weight has, got " +
                     name_of(args.out.dtype));
  if (args.out.rows != args.n || args.out.cols != args.weight.cols)
    throw ShapeError("out: expected shape [n, in_features] = " + shape(args.n, args.weight.cols) + ", got " +
                     shape(args.out.rows, args.out.cols));
  if (args.device.kind == Device::Kind::cuda) return cuda::gather_rows(args);
  check_rows(args.rows, args.n, args.weight.rows);
  const std::int64_t size = size_of(args.weight.dtype), bytes = size * args.weight.cols;
  const auto* from = static_cast<const unsigned char*>(args.weight.data);
  auto* to = static_cast<unsigned char*>(args.out.data);
  for_rows(args.n, args.weight.cols, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i)
      std::memcpy(to + i * args.out.stride * size, from + args.rows[i] * args.weight.stride * size,
                  static_cast<std::size_t>(bytes));
  });
}

void init_uniform(const AnyMatrix& out, double low, double high, std::uint64_t seed, std::int64_t first_row,
                  const Device& device) {
  if (!std::isfinite(low) || !std::isfinite(high) || low > high)
    throw ShapeError("low, high: expected finite bounds low <= high, got " + std::to_string(low) + " and " +
                     std::to_string(high));
  if (first_row < 0) throw ShapeError("first_row: expected at least 0, got " + std::to_string(first_row));
  if (device.kind == Device::Kind::cuda) return cuda::init_uniform(out, low, high, seed, first_row, device);
  switch (out.dtype) {
    case Dtype::f32: return fill_uniform<float>(out, low, high, seed, first_row);
    case Dtype::f64: return fill_uniform<double>(out, low, high, seed, first_row);
    case Dtype::bf16: return fill_uniform<bf16>(out, low, high, seed, first_row);
    default: throw DtypeError("out: expected float32, float64 or bfloat16, got " + std::string(name_of(out.dtype)));
  }
}

}  // namespace widehead
