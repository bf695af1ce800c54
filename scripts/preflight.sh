#!/usr/bin/env bash
# preflight.sh -- is everything here that building the package takes? If not: the one line that installs it
#
# Looks at python3 (or $PYTHON): 3.10 or later, with venv and the headers; and at the C++ compiler (g++, or $CXX): C++20.
# CMake and ninja are not looked for: they come from PyPI into the virtual environment.
set -uo pipefail

python=${PYTHON:-python3}
packages=()
problems=()

missing() {  # missing WHAT PACKAGE...
  problems+=("$1")
  shift
  packages+=("$@")
}

check_python() {
  if ! command -v "$python" >/dev/null; then
    missing "$python: not found" python3 python3-venv python3-dev
    return
  fi
  local version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 0.0)
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    problems+=("$python is Python $version; 3.10 or later is needed: name one with PYTHON=/path/to/python3.x")
    return
  fi
  # Debian names the packages of its own interpreter python3-*, those of another version after the version.
  local stem=python3
  if [ "$version" != "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ]; then
    stem=python$version
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    missing "$python cannot make virtual environments (ensurepip is missing)" "$stem-venv"
  "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' 2>/dev/null ||
    missing "the headers of $python (Python.h) are missing" "$stem-dev"
}

check_compiler() {
  # The one that CMake will take.
  local compiler=${CXX:-} candidate work
  for candidate in c++ g++ clang++; do
    [ -n "$compiler" ] || ! command -v "$candidate" >/dev/null || compiler=$candidate
  done
  if [ -z "$compiler" ]; then
    missing "no C++ compiler was found" g++
    return
  fi
  work=$(mktemp -d)
  cat >"$work/try.cc" <<'PROGRAM'
#include <concepts>
#include <string_view>
struct Options {
  int a = 0;
  int b = 0;
};
template <std::integral T>
constexpr T twice(T x) {
  return x * 2;
}
int main() {
  constexpr Options options{.a = 1, .b = 2};
  static_assert(twice(options.a) == options.b);
  return std::string_view("widehead").starts_with("wide") ? 0 : 1;
}
PROGRAM
  if ! "$compiler" -std=c++20 -pthread "$work/try.cc" -o "$work/try" 2>/dev/null || ! "$work/try"; then
    if [ -n "${CXX:-}" ]; then
      problems+=("CXX=$CXX does not compile C++20; GCC 11 and Clang 14 do")
    else
      missing "$compiler does not compile C++20; GCC 11 and Clang 14 do" g++
    fi
  fi
  rm -rf "$work"
}

check_python
check_compiler
[ ${#problems[@]} -eq 0 ] && exit 0

echo "widehead cannot be built here yet:" >&2
printf '  - %s\n' "${problems[@]}" >&2
if [ ${#packages[@]} -gt 0 ]; then
  sudo=
  [ "$(id -u)" -eq 0 ] || sudo="sudo "
  if command -v apt-get >/dev/null; then
    printf 'This installs what is missing:\n\n  %sapt-get update && %sapt-get install -y %s\n\n' \
      "$sudo" "$sudo" "${packages[*]}" >&2
  else
    printf 'On Debian or Ubuntu that would be the packages: %s\n' "${packages[*]}" >&2
  fi
fi
exit 1
