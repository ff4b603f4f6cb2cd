#!/usr/bin/env bash
# Every GPU figure is made by this: builds, tests, sanitises and measures on a machine with an
# NVIDIA GPU.
#
#   bash bench/gpu/report.sh OUT [PART...]
#
# Needs nvcc and a Python with torch 2.11 or later (PYTHON, python3 by default), and no network.
# Without parts named it runs the first six; each is bounded, together they end within ten minutes,
# and a failed one doesn't stop the next. The others, with build and verdict, take ten more:
#
#   build      the package, with every CUDA kernel
#   test       the tests marked "cuda"; where they find no GPU or no kernels they fail
#   sanitize   all kernels under compute-sanitizer: memcheck, initcheck, racecheck, synccheck
#   launches   kernel launches and host synchronisations of every case, by torch's profiler
#   bench      update, swap and copy against torch and Triton; JSON and plot
#   verdict    what the records in OUT say of the targets
#   step       a training step without and with the average
#   compile    against torch.compile of foreach
#   counters   hardware counters, by ncu
#   variants   the kernels built in other ways
#   memcheck   plans in torch's own memory, under compute-sanitizer's memcheck
#
# Records and plots go to OUT, all output to OUT/log.txt, a short verdict to the terminal. The exit
# status tells whether any part failed; a missed target is no failure. The GPU's settings stay as
# they are.
set -euo pipefail

declare -A SECONDS_FOR=(
  [build]=60 [test]=125 [sanitize]=70 [launches]=45 [bench]=240 [verdict]=12
  [step]=75 [compile]=145 [counters]=95 [variants]=105 [memcheck]=65
)
PARTS=("${@:2}")
[[ ${#PARTS[@]} -gt 0 ]] || PARTS=(build test sanitize launches bench verdict)
for part in "${PARTS[@]}"; do
  if [[ -z ${SECONDS_FOR[$part]:-} ]]; then
    echo "unknown part '$part'; choose from ${!SECONDS_FOR[*]}" >&2
    exit 2
  fi
done
if [[ $# -lt 1 ]]; then
  echo "usage: bash bench/gpu/report.sh OUT [PART...]" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
PART_LOG=$(mktemp)
trap 'rm -f "$PART_LOG"' EXIT

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

measure() { # NAME ARGUMENT...: python -m bench, whose record of an earlier run must not stay.
  rm -f "$OUT/$1".{json,png,svg}
  "$PYTHON" -m bench "${@:2}" --json "$OUT/$1.json"
}

run_build() { make build VENV= PYTHON="$PYTHON"; }

# --require-cuda: a GPU that torch can't see must fail the tests, not skip them. Other versions than
# the pinned ones warn of other things, and a module that one lacks must not stop the rest.
run_test() {
  make test VENV= PYTHON="$PYTHON" \
    PYTEST_ARGS="--require-cuda -m cuda -q -W default --continue-on-collection-errors"
}

run_sanitize() { make gpu-sanitize VENV= PYTHON="$PYTHON"; }

run_launches() { measure launches launches; }

run_bench() { measure bench --device cuda --seconds 180 --plot "$OUT/bench"; }

run_step() { measure step step --seconds 30; }

run_compile() {
  measure compile --device cuda --rounds 101 --cases resnet50 --ops update \
    --providers "fused_ema plan,foreach lerp_,triton,compile foreach lerp_"
}

run_counters() { measure counters counters; }

run_variants() { measure variants variants --seconds 35; }

# Without torch's allocator every tensor is an allocation of its own, and a write past it is seen;
# nothing can be captured then.
run_memcheck() {
  local path="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
  PATH=$path PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
    "$PYTHON" -m pytest --require-cuda -m cuda -q -W default -p no:cacheprovider \
    tests/test_cuda.py tests/test_plan.py -k "(turn or two_streams or side_stream or moved) and not does_not_wait"
}

# Its status tells of targets; only a table that can't be made is a failure.
run_verdict() {
  rm -f "$OUT/verdict.txt"
  local records=("$OUT"/*.json)
  [[ -f ${records[0]} ]] || { echo "no records in $OUT" >&2 && return 1; }
  "$PYTHON" -m bench verdict "${records[@]}" >"$OUT/verdict.txt" ||
    grep -q Targets "$OUT/verdict.txt"
}

# What a reader wants of a part's log in one line.
notes() {
  case $1 in
    test | memcheck) grep -E '[0-9]+ (passed|failed|error)' "$PART_LOG" | tail -n 1 ;;
    sanitize) grep -E 'the kernels: ' "$PART_LOG" | sed 's/: the kernels//' | paste -sd ';' ;;
    launches | bench | step | compile | variants)
      [[ -f $OUT/$1.json ]] && echo "$(grep -c '^FAILED' "$PART_LOG") failures" ;;
  esac
}

export -f measure
for part in "${!SECONDS_FOR[@]}"; do
  export -f "run_$part"
done
export PYTHON OUT

{
  echo "== environment"
  environment
} 2>&1 | tee "$OUT/log.txt"

RESULTS=()
FAILED=0
for part in "${PARTS[@]}"; do
  echo "== $part" | tee -a "$OUT/log.txt"
  start=$SECONDS
  # A shell of its own, since timeout can't bound a function; pipefail so that the part's status
  # counts. Interrupted, pytest still tells what it has seen.
  if timeout --signal=INT --kill-after=10 "${SECONDS_FOR[$part]}" \
    bash -euo pipefail -c "run_$part" >"$PART_LOG" 2>&1; then
    result=ok
  else
    result=FAILED
    FAILED=1
    tail -n 40 "$PART_LOG"
  fi
  cat "$PART_LOG" >>"$OUT/log.txt"
  RESULTS+=("$(printf '%-9s %-7s %4d s  %s' "$part" "$result" $((SECONDS - start)) "$(notes "$part" || true)")")
done

{
  echo "== results"
  printf '%s\n' "${RESULTS[@]}"
} | tee -a "$OUT/log.txt"
if [[ " ${PARTS[*]} " == *" verdict "* && -f $OUT/verdict.txt ]]; then
  cat "$OUT/verdict.txt"
fi
exit "$FAILED"
