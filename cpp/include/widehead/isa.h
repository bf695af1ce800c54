// isa.h -- which instruction-set unit of the CPU kernels runs
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace widehead {

enum class Isa { scalar, avx2, avx512, avx512_bf16 };

const char* name_of(Isa isa);
// The units that are built in and that this processor can run, weakest first.
std::vector<Isa> supported_isas();
// The unit in use: the fastest supported one (on Intel avx512 rather than avx512_bf16), unless the environment variable WIDEHEAD_ISA or set_isa() names another.
// Throws BackendError when the variable names a unit that is unknown or that the processor cannot run.
Isa current_isa();
// Not thread-safe: call it before the work starts (tests and benchmarks do).
void set_isa(Isa isa);
void set_isa(std::string_view name);

}  // namespace widehead
