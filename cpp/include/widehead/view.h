// view.h -- non-owning views of the caller's memory, with data types known at compile time or at run time
#pragma once
#include <cstdint>
#include <cstring>

namespace widehead {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

enum class Dtype : std::uint8_t { f32, f64, bf16, f16, i32, i64, u16 };

constexpr std::int64_t size_of(Dtype t) {
  switch (t) {
    case Dtype::f64:
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    default: return 2;
  }
}
constexpr const char* name_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return "float32";
    case Dtype::f64: return "float64";
    case Dtype::bf16: return "bfloat16";
    case Dtype::f16: return "float16";
    case Dtype::i32: return "int32";
    case Dtype::u16: return "uint16";
    default: return "int64";
  }
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::f64;
};
template <>
struct DtypeOf<bf16> {
  static constexpr Dtype value = Dtype::bf16;
};
template <>
struct DtypeOf<f16> {
  static constexpr Dtype value = Dtype::f16;
};
template <>
struct DtypeOf<std::int32_t> {
  static constexpr Dtype value = Dtype::i32;
};
template <>
struct DtypeOf<std::int64_t> {
  static constexpr Dtype value = Dtype::i64;
};

// Row-major matrix: element (r, c) is data[r * stride + c]; stride counts elements and is at least cols.
template <class T>
struct Matrix {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;
};

template <class T>
Matrix<T> matrix(T* data, std::int64_t rows, std::int64_t cols) {
  return {data, rows, cols, cols};
}

// The same with the element type known at run time. An empty view (data == nullptr) stands for "not given".
struct AnyMatrix {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  AnyMatrix() = default;
  AnyMatrix(void* data_, Dtype dtype_, std::int64_t rows_, std::int64_t cols_, std::int64_t stride_)
      : data(data_), dtype(dtype_), rows(rows_), cols(cols_), stride(stride_) {}
  template <class T>
  AnyMatrix(Matrix<T> m)  // NOLINT: a typed view is an untyped view
      : data(m.data), dtype(DtypeOf<T>::value), rows(m.rows), cols(m.cols), stride(m.stride) {}
  explicit operator bool() const { return data != nullptr; }
};

struct ConstAnyMatrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  ConstAnyMatrix() = default;
  ConstAnyMatrix(const void* data_, Dtype dtype_, std::int64_t rows_, std::int64_t cols_, std::int64_t stride_)
      : data(data_), dtype(dtype_), rows(rows_), cols(cols_), stride(stride_) {}
  ConstAnyMatrix(AnyMatrix m)  // NOLINT: a mutable view is a constant view
      : data(m.data), dtype(m.dtype), rows(m.rows), cols(m.cols), stride(m.stride) {}
  template <class T>
  ConstAnyMatrix(Matrix<const T> m)  // NOLINT
      : data(m.data), dtype(DtypeOf<T>::value), rows(m.rows), cols(m.cols), stride(m.stride) {}
  template <class T>
  ConstAnyMatrix(Matrix<T> m)  // NOLINT
      : data(m.data), dtype(DtypeOf<T>::value), rows(m.rows), cols(m.cols), stride(m.stride) {}
  explicit operator bool() const { return data != nullptr; }
};

// Contiguous vector.
struct AnyVector {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t size = 0;

  AnyVector() = default;
  AnyVector(void* data_, Dtype dtype_, std::int64_t size_) : data(data_), dtype(dtype_), size(size_) {}
  template <class T>
  AnyVector(T* data_, std::int64_t size_) : data(data_), dtype(DtypeOf<T>::value), size(size_) {}
  explicit operator bool() const { return data != nullptr; }
};

struct ConstAnyVector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t size = 0;

  ConstAnyVector() = default;
  ConstAnyVector(const void* data_, Dtype dtype_, std::int64_t size_) : data(data_), dtype(dtype_), size(size_) {}
  ConstAnyVector(AnyVector v) : data(v.data), dtype(v.dtype), size(v.size) {}  // NOLINT
  template <class T>
  ConstAnyVector(const T* data_, std::int64_t size_) : data(data_), dtype(DtypeOf<T>::value), size(size_) {}
  explicit operator bool() const { return data != nullptr; }
};

struct FaultRecord;  // fault.h

// Where the memory lies and the work runs. The rest is for a GPU, and its pointers are to that device's memory; the CPU
// ignores it.
struct Device {
  enum class Kind : std::uint8_t { cpu, cuda };
  Kind kind = Kind::cpu;
  int index = 0;
  void* stream = nullptr;  // an opaque cudaStream_t: the call enqueues its work there and returns
  // Memory to work in, aligned to 256 bytes, at least as much as the call's scratch_bytes(args) says. It may be used for
  // other work on the same stream as soon as the call has returned.
  void* scratch = nullptr;
  std::int64_t scratch_bytes = 0;
  FaultRecord* faults = nullptr;  // takes the first bad value; null: they are only acted upon
  // [1] or null. Not zero when the call's work begins: it changes no weights. Becomes 1 when it meets a bad value.
  std::int32_t* refused = nullptr;
};

}  // namespace widehead
