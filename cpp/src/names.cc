// names.cc -- the names of the enumerations, as messages, files and Python spell them
#include "widehead/isa.h"
#include "widehead/loss.h"
#include "widehead/update.h"

namespace widehead {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

const char* name_of(Loss loss) {
  switch (loss) {
    case Loss::softmax: return "softmax";
    case Loss::bce: return "bce";
    case Loss::squared_hinge: return "squared_hinge";
  }
  return "unknown";
}

const char* name_of(Optimizer optimizer) {
  switch (optimizer) {
    case Optimizer::sgd: return "sgd";
    case Optimizer::adam: return "adam";
    case Optimizer::adagrad: return "adagrad";
  }
  return "unknown";
}

const char* name_of(Rounding rounding) {
  switch (rounding) {
    case Rounding::nearest: return "nearest";
    case Rounding::stochastic: return "stochastic";
    case Rounding::kahan: return "kahan";
  }
  return "unknown";
}

}  // namespace widehead
