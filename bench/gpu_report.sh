#!/usr/bin/env bash
# Every GPU figure is made by this: builds, tests and measures on a machine with an NVIDIA GPU.
#
#   bash bench/gpu_report.sh OUT [build] [test] [sanitize] [bench]
#
# Needs nvcc and a Python with torch 2.11 or later (PYTHON, python3 by default), and no network.
# Without parts named it runs them all; each is bounded, together they end within ten minutes, and
# a failed one doesn't stop the next. Logs, records and plots go to OUT, a verdict to the terminal.
# The exit status tells whether any part failed. The GPU's settings stay as they are.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: bash bench/gpu_report.sh OUT [build] [test] [sanitize] [bench]" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
PARTS=("$@")
[[ $# -gt 0 ]] || PARTS=(build test sanitize bench)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

declare -A SECONDS_FOR=([build]=210 [test]=130 [sanitize]=70 [bench]=180)
for part in "${PARTS[@]}"; do
  if [[ -z ${SECONDS_FOR[$part]:-} ]]; then
    echo "unknown part '$part'; choose from build, test, sanitize, bench" >&2
    exit 2
  fi
done

environment() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  git log -1 --format='commit %h' 2>/dev/null || echo "commit unknown"
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current \
    --format=csv || echo "nvidia-smi failed"
  nvcc --version | tail -n 2 || echo "no nvcc on the PATH"
  "$PYTHON" -c 'import sys, torch
print("python", sys.version.split()[0])
print("torch", torch.__version__, "cuda", torch.version.cuda)
print("gpu", torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None)' ||
    echo "no torch"
  uname -srm
  nproc
}

run_build() { make build VENV= PYTHON="$PYTHON"; }

# --require-cuda: a GPU that torch can't see must fail the tests, not skip them.
run_test() { make test VENV= PYTHON="$PYTHON" PYTEST_ARGS="--require-cuda -m cuda -q"; }

# One tool of four, to end in time; make gpu-sanitize runs them all.
run_sanitize() { bash tests/gpu_sanitize.sh 24 memcheck; }

run_bench() {
  rm -f "$OUT"/bench.{json,png,svg} # Of an earlier run: they must not stand for a failed one.
  "$PYTHON" -m bench --device cuda --seconds 110 --json "$OUT/bench.json" --plot "$OUT/bench"
}

# What a reader wants of a part's log in one line.
notes() {
  case $1 in
    test | sanitize) grep -E '[0-9]+ (passed|failed|error)|nothing checked' "$OUT/$1.log" | tail -n 1 ;;
    bench) [[ -f $OUT/bench.json ]] && echo "$(grep -c '^FAILED' "$OUT/bench.log") wrong providers" ;;
  esac
}

headlines() {
  "$PYTHON" - "$OUT/bench.json" <<'PY'
import json, sys
from itertools import groupby

records = json.load(open(sys.argv[1]))["records"]
key = lambda r: (r["case"], r["op"], f"{r['ema_dtype']}/{r['param_dtype']}", r["cache"])
for (case, op, pair, cache), group in groupby(records, key):
    group = list(group)
    plan = next((r for r in group if r["provider"] == "fused_ema plan"), None)
    torch = [r for r in group if r["kind"] == "torch"]
    if plan and torch and cache == "cold":
        best = min(torch, key=lambda r: r["ms"])
        print(
            f"{case:11} {op:7} {pair:18} {plan['gb_per_s']:7.0f} GB/s,"
            f" {plan['fraction_of_copy'] or 0:4.0%} of copy,"
            f" {best['ms'] / plan['ms']:6.2f}x {best['provider']}, host {plan['host_us']:.0f} us"
        )
PY
}

export -f run_build run_test run_sanitize run_bench
export PYTHON OUT

echo "== environment"
environment 2>&1 | tee "$OUT/environment.txt"

VERDICT=()
FAILED=0
for part in "${PARTS[@]}"; do
  echo "== $part"
  start=$SECONDS
  # A shell of its own, since timeout can't bound a function; pipefail so that the part's status counts.
  if timeout --kill-after=10 "${SECONDS_FOR[$part]}" bash -euo pipefail -c "run_$part" \
    >"$OUT/$part.log" 2>&1; then
    result=ok
  else
    result=FAILED
    FAILED=1
    tail -n 30 "$OUT/$part.log"
  fi
  VERDICT+=("$(printf '%-9s %-7s %4d s  %s' "$part" "$result" $((SECONDS - start)) "$(notes "$part" || true)")")
done

echo "== verdict"
printf '%s\n' "${VERDICT[@]}"
if [[ -f $OUT/bench.json && " ${PARTS[*]} " == *" bench "* ]]; then
  headlines || FAILED=1
fi
exit "$FAILED"
