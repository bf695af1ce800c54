// check.h -- a small test harness: TEST, CHECK, CHECK_EQ, CHECK_NEAR, CHECK_THROWS and the main function
//
// A failed check is printed and counted and the test goes on; an exception that gets out ends its test. Arguments are
// substrings of the names of the tests to run. Exit code: 0 passed, 1 failed, 2 nothing run, 77 skipped, for the
// processor lacks the instruction set that WIDEHEAD_ISA names. Include it in the one source file of a test program.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "widehead/error.h"
#include "widehead/isa.h"

namespace check {

inline int failures = 0;

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  ++failures;
  if (failures <= 50) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

template <class T>
std::string show(const T& value) {
  std::ostringstream out;
  out.precision(17);
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else {
    out << value;
  }
  return out.str();
}

template <class A, class B>
void equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (!(a == b)) fail(file, line, std::string(what) + ": " + show(a) + " is not " + show(b));
}

// Not NaN-tolerant: a NaN on either side fails. Equal infinities pass.
inline void near(double a, double b, double tolerance, const char* what, const char* file, int line) {
  if (a == b || std::fabs(a - b) <= tolerance) return;
  fail(file, line, std::string(what) + ": " + show(a) + " is not within " + show(tolerance) + " of " + show(b));
}

template <class E, class F>
void throws(F&& run, const char* part, const char* what, const char* file, int line) {
  try {
    run();
  } catch (const E& e) {
    if (std::strstr(e.what(), part) == nullptr) {
      fail(file, line, std::string(what) + ": the message \"" + e.what() + "\" lacks \"" + part + "\"");
    }
    return;
  } catch (const std::exception& e) {
    return fail(file, line, std::string(what) + ": another exception came: " + e.what());
  }
  fail(file, line, std::string(what) + ": nothing was thrown");
}

}  // namespace check

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static const check::Register register_##name(#name, &test_##name); \
  static void test_##name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "CHECK(" #condition ")"))
#define CHECK_EQ(a, b) check::equal((a), (b), "CHECK_EQ(" #a ", " #b ")", __FILE__, __LINE__)
#define CHECK_NEAR(a, b, tolerance) check::near((a), (b), (tolerance), "CHECK_NEAR(" #a ", " #b ")", __FILE__, __LINE__)
#define CHECK_THROWS(E, expression, part)                                                                              \
  check::throws<E>([&] { static_cast<void>(expression); }, std::string(part).c_str(), "CHECK_THROWS(" #expression ")", \
                   __FILE__, __LINE__)

int main(int argc, char** argv) {
  try {
    std::printf("isa %s\n", widehead::name_of(widehead::current_isa()));
  } catch (const widehead::BackendError& e) {
    // A name that no processor knows is a slip of the caller, not a lack of the machine.
    const bool slip = std::strstr(e.what(), "there is no instruction set") != nullptr;
    std::printf("%s: %s\n", slip ? "error" : "skipped", e.what());
    return slip ? 2 : 77;
  }
  int ran = 0;
  for (const check::Test& test : check::tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    if (!wanted) continue;
    ++ran;
    const int before = check::failures;
    try {
      test.run();
    } catch (const std::exception& e) {
      check::fail(test.name, 0, std::string("an exception got out: ") + e.what());
    }
    std::printf("%s %s\n", check::failures == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", ran, check::failures);
  return check::failures > 0 ? 1 : ran > 0 ? 0 : 2;
}
