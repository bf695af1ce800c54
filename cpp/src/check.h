// check.h -- checks of arguments, shared by all parts; each error names the argument, what was expected and what came
#pragma once
#include <cstdint>
#include <string>

#include "widehead/error.h"
#include "widehead/update.h"
#include "widehead/view.h"

namespace widehead {

std::string shape(const ConstAnyMatrix& m);  // "[rows, cols]"
bool floating(Dtype t);
// The arithmetic type that goes with a type of weights.
Dtype real_of(Dtype weight);

void expect_dtype(const char* name, Dtype got, bool ok, const char* expected);
void expect_size(const char* name, const ConstAnyVector& v, std::int64_t size, bool required = false);
void expect_shape(const char* name, const ConstAnyMatrix& m, std::int64_t rows, std::int64_t cols);
// Throws DtypeError unless the type is uint16 or int32 and reaches all the inputs of a sparse layer.
void check_index_type(Dtype dtype, std::int64_t in_features);
void check_option(const char* name, double x, bool ok, const char* expected);
// Throws NonFiniteError naming the first row with a NaN or an infinity.
void check_finite(const ConstAnyMatrix& m, const char* name);
void check_finite(const ConstAnyVector& v, const char* name);
// Refuses a step that could not be carried out whole: options out of range, state missing or misshapen.
void check_update(const ConstAnyMatrix& weight, const ConstAnyVector& bias, const Update& update);

}  // namespace widehead
