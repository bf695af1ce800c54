// array.cc -- checked views of the arrays that Python passes in
#include "array.h"

#include "widehead/error.h"
#include "widehead/fault.h"

namespace widehead::python {
namespace {

// An empty view means "not given", so an array without elements, whose pointer may be null, points here instead.
alignas(64) unsigned char g_no_elements[64];

std::string dtype_name(nb::dlpack::dtype t) {
  using Code = nb::dlpack::dtype_code;
  std::string base;
  switch (static_cast<Code>(t.code)) {
    case Code::Int: base = "int"; break;
    case Code::UInt: base = "uint"; break;
    case Code::Float: base = "float"; break;
    case Code::Bfloat: base = "bfloat"; break;
    case Code::Complex: base = "complex"; break;
    case Code::Bool: return "bool";
    default: return "a data type of code " + std::to_string(t.code);
  }
  return base + std::to_string(t.bits);
}

std::string names_of(Dtypes set) {
  std::vector<const char*> names;
  for (Dtype t : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16, Dtype::i32, Dtype::i64, Dtype::u16})
    if (set & one_of(t)) names.push_back(name_of(t));
  std::string text;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (i) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

bool to_dtype(nb::dlpack::dtype t, Dtypes allowed, Dtype* out) {
  using Code = nb::dlpack::dtype_code;
  if (t.lanes != 1) return false;
  const auto code = static_cast<Code>(t.code);
  if (code == Code::Float && t.bits == 32)
    *out = Dtype::f32;
  else if (code == Code::Float && t.bits == 64)
    *out = Dtype::f64;
  else if (code == Code::Float && t.bits == 16)
    *out = Dtype::f16;
  else if (t.bits == 16 && code == Code::UInt && (allowed & one_of(Dtype::u16)))
    *out = Dtype::u16;
  else if (t.bits == 16 && (code == Code::Bfloat || code == Code::UInt))
    *out = Dtype::bf16;
  else if (code == Code::Int && t.bits == 32)
    *out = Dtype::i32;
  else if (code == Code::Int && t.bits == 64)
    *out = Dtype::i64;
  else
    return false;
  return (allowed & one_of(*out)) != 0;
}

std::string shape_text(const nb::ndarray<nb::ro>& a) {
  std::string text = "[";
  for (std::size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

std::string device_text(int type, int index) {
  if (type == nb::device::cpu::value) return "cpu";
  if (type == nb::device::cuda::value) return "cuda:" + std::to_string(index);
  return "a device of DLPack type " + std::to_string(type);
}

}  // namespace

void Arrays::check_device(const char* name, int type, int index) {
  if (type != nb::device::cpu::value && type != nb::device::cuda::value)
    throw BackendError(std::string(name) + ": expected an array on cpu or cuda, got one on " +
                       device_text(type, index));
  if (!first_name_) {
    first_name_ = name;
    device_type_ = type;
    device_index_ = index;
  } else if (type != device_type_ || index != device_index_) {
    throw BackendError(std::string(name) + ": expected an array on " + device_text(device_type_, device_index_) +
                       " as " + first_name_ + " is, got one on " + device_text(type, index));
  }
}

bool Arrays::take(nb::handle h, const Want& want, int ndim, bool writable, Slot* slot) {
  const std::string name = want.name;
  if (h.is_none()) {
    if (want.optional) return false;
    throw DtypeError(name + ": expected an array " + want.axes + ", got None");
  }
  nb::ndarray<nb::ro> a;
  if (writable) {
    nb::ndarray<> w;
    if (nb::try_cast(h, w, false))
      a = nb::ndarray<nb::ro>(w);
    else if (nb::try_cast(h, a, false))
      throw ShapeError(name + ": expected a writable array, got a read-only one");
  } else {
    nb::try_cast(h, a, false);
  }
  if (!a.is_valid())
    throw DtypeError(name + ": expected an array " + want.axes +
                     " (numpy, or a DLPack capsule, which serves once), got " + nb::type_name(h.type()).c_str());
  if (static_cast<int>(a.ndim()) != ndim)
    throw ShapeError(name + ": expected " + std::to_string(ndim) + (ndim == 1 ? " dimension " : " dimensions ") +
                     want.axes + ", got " + std::to_string(a.ndim()) + " " + shape_text(a));
  if (!to_dtype(a.dtype(), want.dtypes, &slot->dtype))
    throw DtypeError(name + ": expected " + names_of(want.dtypes) + ", got " + dtype_name(a.dtype()));
  check_device(want.name, a.device_type(), a.device_id());

  const std::size_t n = a.ndim(), last = n - 1;
  slot->shape[0] = static_cast<std::int64_t>(a.shape(0));
  slot->shape[1] = n == 2 ? static_cast<std::int64_t>(a.shape(1)) : 1;
  slot->stride = slot->shape[1];
  slot->data = a.size() ? const_cast<void*>(static_cast<const void*>(a.data())) : g_no_elements;
  // Arrays of no or one element, and axes of one, come with odd strides: nothing is reached through them.
  if (a.size() > 1) {
    if (a.shape(last) > 1 && a.stride(last) != 1)
      throw ShapeError(name + ": expected the last axis to be contiguous, got a stride of " +
                       std::to_string(a.stride(last)) + " elements; make a contiguous copy first");
    if (n == 2 && a.shape(0) > 1) {
      slot->stride = a.stride(0);
      if (slot->stride < slot->shape[1])
        throw ShapeError(name + ": expected rows that do not overlap, got rows of " + std::to_string(slot->shape[1]) +
                         " elements at a stride of " + std::to_string(slot->stride) + "; make a contiguous copy first");
    }
  }
  alive_.push_back(std::move(a));
  return true;
}

ConstAnyMatrix Arrays::matrix(nb::handle h, const Want& want) {
  Slot s;
  if (!take(h, want, 2, false, &s)) return {};
  return {s.data, s.dtype, s.shape[0], s.shape[1], s.stride};
}

AnyMatrix Arrays::out_matrix(nb::handle h, const Want& want) {
  Slot s;
  if (!take(h, want, 2, true, &s)) return {};
  return {s.data, s.dtype, s.shape[0], s.shape[1], s.stride};
}

ConstAnyVector Arrays::vector(nb::handle h, const Want& want) {
  Slot s;
  if (!take(h, want, 1, false, &s)) return {};
  return {s.data, s.dtype, s.shape[0]};
}

AnyVector Arrays::out_vector(nb::handle h, const Want& want) {
  Slot s;
  if (!take(h, want, 1, true, &s)) return {};
  return {s.data, s.dtype, s.shape[0]};
}

bool Arrays::on_gpu() const { return device_type_ == nb::device::cuda::value; }

Device Arrays::device(nb::handle gpu) {
  Device device;
  device.index = device_index_;
  if (!on_gpu()) return device;
  device.kind = Device::Kind::cuda;
  if (gpu.is_none()) return device;
  const auto dict = nb::cast<nb::dict>(gpu);
  device.stream = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(dict["stream"]));
  const AnyVector faults = out_vector(dict["faults"], {"faults", "[5]", one_of(Dtype::i64), true});
  device.faults = reinterpret_cast<FaultRecord*>(
      const_cast<std::int64_t*>(sized<std::int64_t>(faults, sizeof(FaultRecord) / 8, "faults", "[5]")));
  const AnyVector refused = out_vector(dict["refused"], {"refused", "[1]", one_of(Dtype::i32), true});
  device.refused = const_cast<std::int32_t*>(sized<std::int32_t>(refused, 1, "refused", "[1]"));
  return device;
}

void Arrays::get_scratch(nb::handle gpu, Device& device, std::int64_t bytes) {
  if (bytes == 0 || gpu.is_none()) return;
  const nb::object memory = nb::cast<nb::dict>(gpu)["scratch"]((bytes + 7) / 8);
  const AnyVector view = out_vector(memory, {"scratch", "[n]", one_of(Dtype::i64)});
  device.scratch = view.data;
  device.scratch_bytes = view.size * 8;
}

void check_size(std::int64_t got, std::int64_t expected, const char* name, const char* axes) {
  if (got != expected)
    throw ShapeError(std::string(name) + ": expected shape " + axes + " = [" + std::to_string(expected) + "], got [" +
                     std::to_string(got) + "]");
}

void expect_shape(const AnyMatrix& m, std::int64_t rows, std::int64_t cols, const char* name, const char* axes) {
  if (m && (m.rows != rows || m.cols != cols))
    throw ShapeError(std::string(name) + ": expected shape " + axes + " = [" + std::to_string(rows) + ", " +
                     std::to_string(cols) + "], got [" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]");
}

}  // namespace widehead::python
