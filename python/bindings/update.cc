// update.cc -- a fused update as Python writes it
#include "widehead/update.h"

#include <string>

#include "parts.h"
#include "widehead/error.h"

namespace widehead::python {
namespace {

template <class Enum, std::size_t N>
Enum choice(nb::handle value, const char* key, const Enum (&choices)[N]) {
  const std::string got = nb::isinstance<nb::str>(value) ? nb::cast<std::string>(value) : nb::repr(value).c_str();
  std::string names;
  for (std::size_t i = 0; i < N; ++i) {
    if (got == name_of(choices[i])) return choices[i];
    names += std::string(i == 0 ? "'" : i + 1 == N ? " or '" : ", '") + name_of(choices[i]) + "'";
  }
  throw ShapeError("update: expected " + std::string(key) + " to be " + names + ", got '" + got + "'");
}

template <class T>
T number(nb::handle value, const std::string& key, const char* kind) {
  T out;
  if (!nb::try_cast(value, out))
    throw ShapeError("update: expected " + key + " to be " + kind + ", got " + nb::repr(value).c_str());
  return out;
}

}  // namespace

Update parse_update(nb::handle dict, Arrays& arrays) {
  if (!nb::isinstance<nb::dict>(dict))
    throw DtypeError("update: expected a dict, got " + std::string(nb::type_name(dict.type()).c_str()));
  Update u;
  for (auto [k, v] : nb::borrow<nb::dict>(dict)) {
    const std::string key = nb::cast<std::string>(nb::str(k));
    const auto real = [&, value = v] { return number<double>(value, key, "a number"); };
    const auto natural = [&, value = v] { return number<std::uint64_t>(value, key, "an integer of at least 0"); };
    if (key == "optimizer")
      u.optimizer = choice(v, "optimizer", {Optimizer::sgd, Optimizer::adam, Optimizer::adagrad});
    else if (key == "rounding")
      u.rounding = choice(v, "rounding", {Rounding::nearest, Rounding::stochastic, Rounding::kahan});
    else if (key == "lr")
      u.lr = real();
    else if (key == "momentum")
      u.momentum = real();
    else if (key == "beta1")
      u.beta1 = real();
    else if (key == "beta2")
      u.beta2 = real();
    else if (key == "eps")
      u.eps = real();
    else if (key == "weight_decay")
      u.weight_decay = real();
    else if (key == "step")
      u.step = natural();
    else if (key == "seed")
      u.seed = natural();
    else if (key == "first_row")
      u.first_row = number<std::int64_t>(v, key, "an integer");
    else if (key == "device_lr")
      u.device_lr = sized<float>(arrays.vector(v, {"update.device_lr", "[1]", one_of(Dtype::f32), true}), 1,
                                 "update.device_lr", "[1]");
    else if (key == "device_step")
      u.device_step = sized<std::int64_t>(arrays.vector(v, {"update.device_step", "[1]", one_of(Dtype::i64), true}), 1,
                                          "update.device_step", "[1]");
    else if (key == "first")
      u.first = arrays.out_matrix(v, {"update.first", "[n_classes, in_features]", kResult, true});
    else if (key == "second")
      u.second = arrays.out_matrix(v, {"update.second", "[n_classes, in_features or 1]", kResult, true});
    else if (key == "compensation")
      u.compensation = arrays.out_matrix(
          v, {"update.compensation", "[n_classes, in_features]", one_of(Dtype::bf16) | one_of(Dtype::f16), true});
    else if (key == "bias_first")
      u.bias_first = arrays.out_vector(v, {"update.bias_first", "[n_classes]", kResult, true});
    else if (key == "bias_second")
      u.bias_second = arrays.out_vector(v, {"update.bias_second", "[n_classes]", kResult, true});
    else
      throw ShapeError("update: unknown key '" + key + "'");
  }
  return u;
}

}  // namespace widehead::python
