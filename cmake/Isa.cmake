# Isa -- which instruction-set units this processor family has, and the flags of each
#
# Every unit compiles the same bodies (src/cpu/*-inl.h) in a namespace of its own; the choice is made at run time.
# -ffp-contract=fast lets the compiler form fused multiply-adds from a*b+c: the kernels rely on it; -fno-math-errno lets
# loops with square roots vectorise.
set(WIDEHEAD_ISAS scalar)
set(_optimise -O3)
if(WIDEHEAD_SANITIZE)
  set(_optimise -O1)
endif()
set(WIDEHEAD_FLAGS_scalar ${_optimise} -ffp-contract=fast -fno-math-errno)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND WIDEHEAD_ISAS avx2 avx512 avx512_bf16)
  set(_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
  # GCC 12 calls the undefined operand of its own masked intrinsics uninitialised.
  list(APPEND _avx512 $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  set(WIDEHEAD_FLAGS_avx2 ${_optimise} -ffp-contract=fast -fno-math-errno -mavx2 -mfma -mf16c -mbmi2)
  set(WIDEHEAD_FLAGS_avx512 ${_optimise} -ffp-contract=fast -fno-math-errno ${_avx512})
  set(WIDEHEAD_FLAGS_avx512_bf16 ${_optimise} -ffp-contract=fast -fno-math-errno ${_avx512} -mavx512bf16)
endif()

set(WIDEHEAD_ONLY_ISAS "" CACHE STRING "Build these instruction sets alone, e.g. scalar;avx2 (sanitizers); empty: all")
if(WIDEHEAD_ONLY_ISAS)
  foreach(isa IN LISTS WIDEHEAD_ONLY_ISAS)
    if(NOT isa IN_LIST WIDEHEAD_ISAS)
      message(FATAL_ERROR "WIDEHEAD_ONLY_ISAS: ${isa} is none of ${WIDEHEAD_ISAS}")
    endif()
  endforeach()
  if(NOT "scalar" IN_LIST WIDEHEAD_ONLY_ISAS)
    message(FATAL_ERROR "WIDEHEAD_ONLY_ISAS: scalar must be among them")
  endif()
  set(WIDEHEAD_ISAS ${WIDEHEAD_ONLY_ISAS})
endif()
