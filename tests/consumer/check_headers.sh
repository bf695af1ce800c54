#!/usr/bin/env bash
# check_headers.sh -- the public headers may pull in nothing but the standard library
#
# usage: check_headers.sh COMPILER INCLUDE_DIR
set -euo pipefail
compiler=$1
include=$2

status=0
for header in "$include"/widehead/*.h; do
  # The names of all files that the header includes, one a line.
  files=$("$compiler" -std=c++20 -x c++ -I"$include" -M "$header" | tr -d '\\' | tr ' ' '\n' | grep '/' | grep -v "^$include/widehead/")
  [ "$(grep -c . <<<"$files")" -ge 1 ] || { echo "$header: nothing to look at" >&2; status=1; }
  if bad=$(grep -E '(intrin|arm_neon|arm_sve|amx|Python|numpy|nanobind|torch|ATen|c10|cuda|dlpack|omp)[^/]*\.h$' <<<"$files"); then
    echo "$header includes what a consumer should not see:" >&2
    echo "$bad" >&2
    status=1
  fi
done
[ $status -eq 0 ] && echo "the public headers include the standard library alone"
exit $status
