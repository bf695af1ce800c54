#!/usr/bin/env bash
# isa_leak_test.sh -- no unit but the ISA's own may hold its instructions, nor define a symbol that other units may share
#
# usage: isa_leak_test.sh OBJDUMP libwidehead.a
set -euo pipefail
objdump=$1
library=$2

# "member count" of every member of the archive whose code names the register class in $1 (a regular expression).
members_using() {
  "$objdump" -d --no-show-raw-insn "$library" | awk -v pattern="$1" '
    /file format/ { sub(/:.*/, "", $1); member = $1 }
    $0 ~ pattern { count[member]++ }
    END { for (m in count) print m, count[m] }'
}

# A weak symbol (an inline function, a template) of a unit with wider instructions may replace the baseline's copy when the
# program is linked: so each must lie in the unit's own namespace.
shared_symbols() {
  "$objdump" -t "$library" | awk '
    /file format/ {
      member = $1
      sub(/:.*/, "", member)
      unit = member
      sub(/^kernels_/, "", unit)
      sub(/\.cc.*/, "", unit)
    }
    member ~ /^kernels_avx/ && /^[0-9a-f]+ +[uw] +F / && $NF !~ "^_ZZ?NK?8widehead3cpu" length(unit) unit { print member, $NF }
  ' | sort -u
}

failed=0
report() {
  echo "$1" >&2
  failed=1
}

total=$("$objdump" -d --no-show-raw-insn "$library" | grep -c 'file format' || true)
[ "$total" -gt 3 ] || report "only $total members found in $library: is this the library?"

while read -r member count; do
  case $member in
    kernels_avx512*) echo "$member: $count instructions on zmm" ;;
    *) report "$member: $count instructions on zmm outside the AVX-512 units" ;;
  esac
done < <(members_using '%zmm')
while read -r member count; do
  case $member in
    kernels_avx*) echo "$member: $count instructions on ymm" ;;
    *) report "$member: $count instructions on ymm outside the AVX units" ;;
  esac
done < <(members_using '%ymm')
while read -r member symbol; do
  report "$member: shares the symbol $symbol with other units: put it into the unit's own namespace"
done < <(shared_symbols)

[ "$failed" -ne 0 ] || echo "no instruction set leaks out of its units"
exit "$failed"
