// kernels.cc -- the table of the current instruction-set unit
#include "cpu/kernels.h"

#include "widehead/isa.h"

namespace widehead::cpu {

const Kernels& kernels() {
  switch (current_isa()) {
#ifdef WIDEHEAD_HAVE_AVX2
    case Isa::avx2: return avx2::kTable;
#endif
#ifdef WIDEHEAD_HAVE_AVX512
    case Isa::avx512: return avx512::kTable;
#endif
#ifdef WIDEHEAD_HAVE_AVX512_BF16
    case Isa::avx512_bf16: return avx512_bf16::kTable;
#endif
    default: return scalar::kTable;
  }
}

}  // namespace widehead::cpu
