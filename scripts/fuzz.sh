#!/usr/bin/env bash
# Fuzzes every parser of files: builds the programs of tests/fuzz, then runs each for SECONDS (60), two at a time.
#
#   scripts/fuzz.sh [SECONDS] [TARGET…]
#
# What they find is kept: inputs that reach new code in build-fuzz/corpus/TARGET, inputs that fail in build-fuzz/failures.
# Exit status 1 when one of them found a failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
shift $(($# > 0))
command -v clang++-19 >/dev/null && [[ -n $(clang++-19 -print-file-name=libclang_rt.fuzzer.a 2>/dev/null) ]] ||
  { echo "fuzz: clang-19 and libclang-rt-19-dev are missing: scripts/setup.sh installs them" >&2; exit 1; }
mkdir -p build-fuzz/failures
cmake --preset fuzz >build-fuzz/log 2>&1 && cmake --build --preset fuzz >>build-fuzz/log 2>&1 ||
  { tail -n 40 build-fuzz/log >&2; exit 1; }
build-fuzz/make_seeds build-fuzz/seeds || exit 1
targets=("$@")
(($#)) || targets=(build-fuzz/seeds/*/)
targets=("${targets[@]%/}")
targets=("${targets[@]##*/}")

run() {
  local name=$1
  mkdir -p "build-fuzz/corpus/$name"
  # Errors that the parsers report are no output of ours; libFuzzer's own goes to its log.
  if "build-fuzz/fuzz_$name" -max_total_time="$seconds" -max_len=65536 -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 \
    -artifact_prefix="build-fuzz/failures/$name-" "build-fuzz/corpus/$name" "build-fuzz/seeds/$name" >"build-fuzz/$name.log" 2>&1; then
    printf 'fuzz: %-14s %9d inputs, none failed\n' "$name" "$(sed -n 's/^stat::number_of_executed_units: *//p' "build-fuzz/$name.log")"
  else
    printf 'fuzz: %-14s FAILED; the input is in build-fuzz/failures, the report in build-fuzz/%s.log:\n' "$name" "$name"
    grep -m 5 -E 'ERROR|SUMMARY|runtime error|terminate|what\(\)|ASSERT' "build-fuzz/$name.log"
    return 1
  fi
}

status=0
for ((i = 0; i < ${#targets[@]}; i += 2)); do
  run "${targets[i]}" &
  first=$!
  second=
  if ((i + 1 < ${#targets[@]})); then
    run "${targets[i + 1]}" &
    second=$!
  fi
  wait "$first" || status=1
  if [[ -n $second ]]; then wait "$second" || status=1; fi
done
exit "$status"
