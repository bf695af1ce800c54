// isa.cc -- finds out what the processor can run and picks the unit of kernels
#include "widehead/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "widehead/error.h"

namespace widehead {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

constexpr bool built(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(WIDEHEAD_HAVE_AVX2)
    case Isa::avx2: return true;
#endif
#if defined(WIDEHEAD_HAVE_AVX512)
    case Isa::avx512: return true;
#endif
#if defined(WIDEHEAD_HAVE_AVX512_BF16)
    case Isa::avx512_bf16: return true;
#endif
    default: return false;
  }
}

#if defined(__x86_64__)
// The compiler's run-time library has asked the operating system too (xgetbv): registers that it does not save do not
// count.
bool runs(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: {
      // Half-precision conversion is the one flag that older compilers do not know by name.
      unsigned a = 0, b = 0, c = 0, d = 0;
      const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
      return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    }
    case Isa::avx512:
      return runs(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd");
    case Isa::avx512_bf16: return runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}
#else
bool runs(Isa isa) { return isa == Isa::scalar; }
#endif

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(name_of(isa));
  return text;
}

Isa check(std::string_view name, const char* source) {
  const auto* found = std::find_if(std::begin(kAll), std::end(kAll), [&](Isa isa) { return name == name_of(isa); });
  const std::vector<Isa> usable = supported_isas();
  if (found == std::end(kAll)) {
    throw BackendError(std::string(source) + ": there is no instruction set \"" + std::string(name) +
                       "\"; use one of " + names(usable));
  }
  if (std::find(usable.begin(), usable.end(), *found) == usable.end()) {
    throw BackendError(std::string(source) + ": " + name_of(*found) + " is " +
                       (built(*found) ? "not supported by this processor" : "not part of this build") +
                       "; use one of " + names(usable));
  }
  return *found;
}

// -1 until it is asked for or set.
std::atomic<int> chosen{-1};

}  // namespace

std::vector<Isa> supported_isas() {
  static const std::vector<Isa> usable = [] {
    std::vector<Isa> list;
    for (Isa isa : kAll) {
      if (built(isa) && runs(isa)) list.push_back(isa);
    }
    return list;
  }();
  return usable;
}

// Intel's cores run a bfloat16 dot product at a quarter of the rate of a float32 multiply-add (measured: 88 against 168 GFLOP/s
// a core at two terms a lane), so widening bfloat16 to float32 is faster there; AMD's run it at the same rate.
static Isa default_isa() {
  const std::vector<Isa> usable = supported_isas();
#if defined(__x86_64__)
  if (usable.back() == Isa::avx512_bf16 && __builtin_cpu_is("intel")) return Isa::avx512;
#endif
  return usable.back();
}

Isa current_isa() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    const char* text = std::getenv("WIDEHEAD_ISA");
    const bool forced = text != nullptr && *text != '\0';
    value = static_cast<int>(forced ? check(text, "WIDEHEAD_ISA") : default_isa());
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void set_isa(Isa isa) { set_isa(std::string_view(name_of(isa))); }

void set_isa(std::string_view name) {
  chosen.store(static_cast<int>(check(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace widehead
