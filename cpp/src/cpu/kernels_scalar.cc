// kernels_scalar.cc -- the scalar unit
#define WIDEHEAD_ISA_NAME scalar
#define WIDEHEAD_VECTOR_BYTES 16
#include "cpu/kernels-inl.h"
