// kernels_avx512.cc -- the avx512 unit
#define WIDEHEAD_ISA_NAME avx512
#define WIDEHEAD_VECTOR_BYTES 64
#include "cpu/kernels-inl.h"
