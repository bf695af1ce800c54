// isa_test.cc -- which kernels run: names, order, forcing, and the errors of a wrong choice
#include "widehead/isa.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "widehead/error.h"

namespace {

using widehead::current_isa;
using widehead::Isa;
using widehead::set_isa;

struct RestoreIsa {
  ~RestoreIsa() { set_isa(before); }
  Isa before = current_isa();
};

TEST(supported_begins_with_scalar_and_ascends) {
  const std::vector<Isa> usable = widehead::supported_isas();
  CHECK(!usable.empty() && usable.front() == Isa::scalar);
  CHECK(std::is_sorted(usable.begin(), usable.end()));
  CHECK(std::adjacent_find(usable.begin(), usable.end()) == usable.end());
}

TEST(names) {
  CHECK_EQ(std::string(widehead::name_of(Isa::scalar)), "scalar");
  CHECK_EQ(std::string(widehead::name_of(Isa::avx2)), "avx2");
  CHECK_EQ(std::string(widehead::name_of(Isa::avx512)), "avx512");
  CHECK_EQ(std::string(widehead::name_of(Isa::avx512_bf16)), "avx512_bf16");
}

TEST(set_by_value_and_by_name) {
  RestoreIsa restore;
  for (Isa isa : widehead::supported_isas()) {
    set_isa(isa);
    CHECK_EQ(current_isa(), isa);
    set_isa("scalar");
    CHECK_EQ(current_isa(), Isa::scalar);
    set_isa(std::string_view(widehead::name_of(isa)));
    CHECK_EQ(current_isa(), isa);
  }
}

TEST(unknown_and_unsupported_are_refused) {
  RestoreIsa restore;
  set_isa(Isa::scalar);
  CHECK_THROWS(widehead::BackendError, set_isa("sse9"), "no instruction set \"sse9\"; use one of scalar");
  CHECK_THROWS(widehead::BackendError, set_isa(""), "set_isa");
  CHECK_THROWS(widehead::BackendError, set_isa("AVX2"), "\"AVX2\"");
  CHECK_THROWS(widehead::BackendError, set_isa(static_cast<Isa>(17)), "set_isa");
  const std::vector<Isa> usable = widehead::supported_isas();
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::find(usable.begin(), usable.end(), isa) != usable.end()) continue;
    CHECK_THROWS(widehead::BackendError, set_isa(isa), widehead::name_of(isa));
  }
  CHECK_EQ(current_isa(), Isa::scalar);
}

// The variable is read once, so each value needs a process of its own: this program again, asked for the test below.
TEST(environment_forces_the_unit) {
  std::fflush(stdout);
  for (Isa isa : widehead::supported_isas()) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("WIDEHEAD_ISA", widehead::name_of(isa), 1);
      setenv("WIDEHEAD_TEST_CHILD", widehead::name_of(isa), 1);
      execl("/proc/self/exe", "isa_test", "child_runs_what_the_environment_names", static_cast<char*>(nullptr));
      _exit(98);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

TEST(child_runs_what_the_environment_names) {
  const char* name = std::getenv("WIDEHEAD_TEST_CHILD");
  if (name != nullptr) CHECK_EQ(std::string(widehead::name_of(current_isa())), name);
}

// check.h says so and runs nothing, which is exit code 2.
TEST(environment_with_a_wrong_name_is_refused) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setenv("WIDEHEAD_ISA", "quantum", 1);
    execl("/proc/self/exe", "isa_test", "names", static_cast<char*>(nullptr));
    _exit(98);
  }
  int status = 0;
  CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 2);
}

}  // namespace
