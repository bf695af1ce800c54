// kernels_avx2.cc -- the avx2 unit
#define WIDEHEAD_ISA_NAME avx2
#define WIDEHEAD_VECTOR_BYTES 32
#include "cpu/kernels-inl.h"
