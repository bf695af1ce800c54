// kernels_avx512_bf16.cc -- the avx512_bf16 unit
#define WIDEHEAD_ISA_NAME avx512_bf16
#define WIDEHEAD_VECTOR_BYTES 64
#define WIDEHEAD_BF16_DOT 1
#include "cpu/kernels-inl.h"
