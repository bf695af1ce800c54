# Isa -- which instruction-set units this processor family has, and the flags of each
#
# Every unit compiles the same bodies (src/cpu/*-inl.h) in a namespace of its own; the choice is made at run time.
# -ffp-contract=fast -fno-math-errno lets the compiler form fused multiply-adds from a*b+c: the kernels rely on it. -fno-math-errno: a square
# root that may have to set errno is a call, and the loop around it stays scalar.
set(WIDEHEAD_ISAS scalar)
set(WIDEHEAD_FLAGS_scalar -O3 -ffp-contract=fast -fno-math-errno)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND WIDEHEAD_ISAS avx2 avx512 avx512_bf16)
  set(_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
  set(WIDEHEAD_FLAGS_avx2 -O3 -ffp-contract=fast -fno-math-errno -mavx2 -mfma -mf16c -mbmi2)
  set(WIDEHEAD_FLAGS_avx512 -O3 -ffp-contract=fast -fno-math-errno ${_avx512})
  set(WIDEHEAD_FLAGS_avx512_bf16 -O3 -ffp-contract=fast -fno-math-errno ${_avx512} -mavx512bf16)
endif()
