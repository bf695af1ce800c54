// array.h -- checked views of the arrays that Python passes in
//
// Arrays come through DLPack (numpy, capsules, anything with __dlpack__) and are never copied. A refusal names the
// argument, what was expected and what came. NumPy has no bfloat16: arrays of uint16 are read as bfloat16,
// unless the argument takes uint16.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

#include "widehead/view.h"

namespace widehead::python {

namespace nb = nanobind;

// A set of data types, as bits.
using Dtypes = unsigned;
constexpr Dtypes one_of(Dtype t) { return 1u << static_cast<unsigned>(t); }
inline constexpr Dtypes kFloating = one_of(Dtype::f32) | one_of(Dtype::f64) | one_of(Dtype::bf16) | one_of(Dtype::f16);
inline constexpr Dtypes kStored =
    one_of(Dtype::f32) | one_of(Dtype::f64) | one_of(Dtype::bf16) | one_of(Dtype::f16);  // weights and their gradients
inline constexpr Dtypes kResult = one_of(Dtype::f32) | one_of(Dtype::f64);               // losses, scores, moments

// What an argument must be. `axes` is how messages write its shape, e.g. "[batch, in_features]".
struct Want {
  const char* name;
  const char* axes;
  Dtypes dtypes;
  bool optional = false;
};

// The arrays of one call: keeps them alive, and insists that they lie on one device. Must be destroyed with the GIL
// held.
class Arrays {
 public:
  ConstAnyMatrix matrix(nb::handle h, const Want& want);
  AnyMatrix out_matrix(nb::handle h, const Want& want);
  ConstAnyVector vector(nb::handle h, const Want& want);
  AnyVector out_vector(nb::handle h, const Want& want);

  // The device of the arrays seen so far.
  bool on_gpu() const;
  // The same with what `gpu` brings: None, or a dict of "stream" (a cudaStream_t as an integer), "scratch" (called with
  // a number of int64 elements, returns an array of so many), "faults" (int64 [5] or None) and "refused" (int32 [1] or
  // None).
  Device device(nb::handle gpu);
  // Asks gpu["scratch"] for device.scratch.
  void get_scratch(nb::handle gpu, Device& device, std::int64_t bytes);

 private:
  struct Slot {
    void* data;
    Dtype dtype;
    std::int64_t shape[2];
    std::int64_t stride;  // of the first axis, in elements
  };
  bool take(nb::handle h, const Want& want, int ndim, bool writable, Slot* slot);
  void check_device(const char* name, int type, int index);

  std::vector<nb::ndarray<nb::ro>> alive_;
  const char* first_name_ = nullptr;
  int device_type_ = nb::device::cpu::value;
  int device_index_ = 0;
};

// Pointers forget their size, so it is checked here: throws ShapeError unless the vector has `size` elements.
template <class T>
const T* sized(const ConstAnyVector& v, std::int64_t size, const char* name, const char* axes);
// Throws ShapeError: "name: expected <axes> = [rows, cols], got [..]".
void expect_shape(const AnyMatrix& m, std::int64_t rows, std::int64_t cols, const char* name, const char* axes);

void check_size(std::int64_t got, std::int64_t expected, const char* name, const char* axes);

template <class T>
const T* sized(const ConstAnyVector& v, std::int64_t size, const char* name, const char* axes) {
  if (!v) return nullptr;
  check_size(v.size, size, name, axes);
  return static_cast<const T*>(v.data);
}

}  // namespace widehead::python
