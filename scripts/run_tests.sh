#!/usr/bin/env bash
# run_tests.sh -- builds the C++ tests, runs them and the Python tests, and ends with a summary
#
# usage: run_tests.sh VENV [pytest arguments]      (the package is installed in VENV)
# environment: JOBS=n parallel jobs; WERROR=ON makes warnings errors; FILTER=regex runs those C++ tests alone
set -uo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/$1
shift
jobs=${JOBS:-$(nproc)}
build=build/test
export PATH=$venv/bin:$PATH
# Several test processes at once: without this each of PyTorch's pools would want the whole machine. Tests that are about the
# number of threads set it themselves.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

names=()
results=()
times=()
status=0

stage() {  # stage NAME COMMAND...
  local name=$1 begin=$SECONDS rc
  shift
  echo
  echo "==> $name"
  "$@"
  rc=$?
  names+=("$name")
  times+=($((SECONDS - begin)))
  if [ $rc -eq 0 ]; then results+=("passed"); else results+=("FAILED"); fi
  [ $rc -eq 0 ] || status=1
  return $rc
}

build_cpp() {
  cmake -S . -B "$build" -G Ninja -DWIDEHEAD_TESTS=ON -DWIDEHEAD_PYTHON=OFF -DWIDEHEAD_WERROR="${WERROR:-OFF}" \
    --log-level=WARNING &&
    cmake --build "$build" --parallel "$jobs"
}
run_cpp() {
  ctest --test-dir "$build" --output-on-failure --parallel "$jobs" ${FILTER:+-R "$FILTER"}
}
run_python() {
  # One process costs less than two when there is one processor to run them.
  local workers=()
  [ "$jobs" -gt 1 ] && workers=(-n "$jobs" --dist loadfile)
  python -m pytest "${workers[@]}" "$@"
}

if stage "C++: build" build_cpp; then
  stage "C++: tests" run_cpp
fi
stage "Python: tests" run_python "$@"

echo
echo "Summary"
for i in "${!names[@]}"; do printf '  %-16s %-8s %5d s\n' "${names[$i]}" "${results[$i]}" "${times[$i]}"; done
exit $status
