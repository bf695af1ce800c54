// error.h -- the exceptions of the library; each message names the argument, what was expected and what came
#pragma once
#include <stdexcept>
#include <string>

namespace widehead {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// A shape, a stride, or an option value that does not fit the others.
class ShapeError : public Error {
 public:
  using Error::Error;
};
// A data type that the operation does not take.
class DtypeError : public Error {
 public:
  using Error::Error;
};
// A class label that is out of range, out of order or repeated.
class LabelError : public Error {
 public:
  using Error::Error;
};
// A value that is NaN or infinite where that would damage the state.
class NonFiniteError : public Error {
 public:
  using Error::Error;
};
// More memory, classes or neighbours than the operation can hold.
class CapacityError : public Error {
 public:
  using Error::Error;
};
// A backend that is not built or not usable here; the message says how to cure it.
class BackendError : public Error {
 public:
  using Error::Error;
};

}  // namespace widehead
