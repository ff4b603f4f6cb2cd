#!/usr/bin/env bash
# Every GPU figure is made by this: builds, tests, sanitises and measures on a machine with an
# NVIDIA GPU.
#
#   bash bench/gpu/report.sh [--seconds N] [--libraries FOLDER] OUT [PART...]
#
# Needs nvcc and a Python with torch 2.11 or later (PYTHON, python3 by default), and no network.
# Without parts named it takes all of them, what tells most first. Each has a bound, and a part
# whose bound doesn't fit into what is left of N seconds (660) is left out; the end names those, and
# the command that runs them. A failed part doesn't stop the next.
#
#   build      the package, with every CUDA kernel; or a module that is here, if it is of these
#              sources and works
#   test       the tests marked "cuda"; where they find no GPU or no kernels they fail
#   sanitize   all kernels under compute-sanitizer: memcheck, initcheck, racecheck, synccheck
#   memcheck   plans in torch's own memory, under compute-sanitizer's memcheck
#   launches   kernel launches and host synchronisations of every case, by torch's profiler
#   bench      update, swap and copy against torch and Triton; JSON and plot
#   step       a training step without and with the average
#   host       how long a call keeps the host, alone and among busy cores
#   counters   hardware counters, by ncu
#   compile    against torch.compile of foreach
#   variants   the kernels built in other ways; with --libraries those of an earlier
#              `python -m bench variants --build-only --folder FOLDER`
#
# test, sanitize and memcheck run beside each other, and nothing that is timed beside them. At the
# end `python -m bench verdict` judges all records in OUT, those of earlier calls too.
#
# Records and plots go to OUT, all output to the end of OUT/log.txt, a short verdict to the
# terminal. The exit status tells whether any part failed; a missed target is no failure, nor is a
# part that was left out. The GPU's settings stay as they are.
set -euo pipefail

# What each took on 16 cores and an H200, and some more: the first five in all 430 s.
declare -A SECONDS_FOR=(
  [build]=110 [test]=160 [sanitize]=160 [memcheck]=160 [launches]=40 [bench]=200 [step]=100
  [host]=90 [counters]=95 [compile]=145 [variants]=165 [verdict]=12
)
PARTS=(build test sanitize memcheck launches bench step host counters compile variants)
CHECKS=" test sanitize memcheck "
UNASKED=660 # Of fifteen minutes, with the machine's start and what has to be brought there.
START=20 # Until the first part begins.
GRACE=10 # To end in, for a part that is interrupted.

usage() {
  echo "usage: bash bench/gpu/report.sh [--seconds N] [--libraries FOLDER] OUT [PART...]" >&2
  exit 2
}

COMMAND=(${PYTHON+env "PYTHON=$PYTHON"} bash "${BASH_SOURCE[0]}")
BUDGET=$UNASKED
LIBRARIES=
while [[ ${1:-} == --* ]]; do
  [[ $# -ge 2 ]] || usage
  case $1 in
    --seconds) [[ $2 =~ ^[1-9][0-9]*$ ]] || usage && BUDGET=$2 ;;
    --libraries)
      [[ -d $2 ]] || { echo "--libraries: $2 is no folder" >&2 && exit 2; }
      LIBRARIES=$(cd "$2" && pwd)
      COMMAND+=(--libraries "$2")
      SECONDS_FOR[variants]=$((SECONDS_FOR[variants] - 60)) # Nothing to compile.
      ;;
    *) usage ;;
  esac
  shift 2
done
[[ $# -ge 1 ]] || usage
for part in "${@:2}"; do
  if [[ " ${PARTS[*]} " != *" $part "* ]]; then
    echo "unknown part '$part'; choose from ${PARTS[*]}" >&2
    exit 2
  fi
done
[[ $# -eq 1 ]] || PARTS=("${@:2}")
mkdir -p "$1"
GIVEN_OUT=$1
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
export PYTHON OUT LIBRARIES PYTHONUNBUFFERED=1
LOGS=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$LOGS"' EXIT

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

# A module that was carried here saves the build, if it is of these sources and works. Another one
# is removed first: where the build fails, nothing must measure it.
run_build() {
  if "$PYTHON" -m bench.gpu.module; then
    return
  fi
  rm -f fused_ema/_C.*.so fused_ema/_build_info.json
  make build VENV= PYTHON="$PYTHON"
  "$PYTHON" -m bench.gpu.module
}

# --require-cuda: a GPU that torch can't see must fail the tests, not skip them. Other versions than
# the pinned ones warn of other things, and a module that one lacks must not stop the rest.
run_test() {
  local workers=() cores
  cores=$(nproc)
  if ((cores > 1)) && "$PYTHON" -c "import xdist" 2>/dev/null; then
    workers=(-n $((cores < 6 ? cores : 6)))
  fi
  "$PYTHON" -m pytest --require-cuda -m cuda -q -W default --continue-on-collection-errors \
    "${workers[@]}"
}

run_sanitize() { make gpu-sanitize VENV= PYTHON="$PYTHON"; }

run_launches() { measure launches launches; }

run_bench() { measure bench --device cuda --seconds 110 --plot "$OUT/bench"; }

run_step() { measure step step --seconds 30; }

run_host() { measure host host --device cuda --seconds 40; }

run_compile() {
  measure compile --device cuda --rounds 101 --cases resnet50 --ops update \
    --providers "fused_ema plan,foreach lerp_,triton,compile foreach lerp_"
}

run_counters() { measure counters counters; }

run_variants() { measure variants variants --seconds 35 ${LIBRARIES:+--libraries "$LIBRARIES"}; }

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
  "$PYTHON" -m bench verdict "$OUT"/*.json >"$OUT/verdict.txt" || grep -q Targets "$OUT/verdict.txt"
}

# What a reader wants of a part's log in one line.
notes() {
  case $1 in
    build) grep '^module: ' "$LOGS/$1" | tail -n 1 ;;
    test | memcheck) grep -E '[0-9]+ (passed|failed|error)' "$LOGS/$1" | tail -n 1 ;;
    sanitize) grep -E 'the kernels: ' "$LOGS/$1" | sed 's/: the kernels//' | paste -sd ';' ;;
    launches | bench | step | host | compile | variants)
      [[ -f $OUT/$1.json ]] && echo "$(grep -c '^FAILED' "$LOGS/$1") failures" ;;
  esac
}

# The bounds of these parts, those that run beside each other counted once.
bounds_of() { # PART...
  local total=0 beside=0 part
  for part in "$@"; do
    if [[ $CHECKS != *" $part "* ]]; then
      total=$((total + SECONDS_FOR[$part]))
    elif ((SECONDS_FOR[$part] > beside)); then
      beside=${SECONDS_FOR[$part]}
    fi
  done
  echo $((total + beside))
}

RESULTS=()
FAILED=0

# Runs parts beside each other. A shell of its own for each, since timeout can't bound a function;
# pipefail so that the part's status counts. Interrupted, pytest and bench still tell what they have
# seen: timeout's children heed an interrupt, which others in the background of a script ignore.
run_beside() { # PART...
  local part pid=() result took line i=0
  echo "== $*" | tee -a "$OUT/log.txt"
  for part in "$@"; do
    timeout --signal=INT --kill-after="$GRACE" "${SECONDS_FOR[$part]}" \
      bash -euo pipefail -c "trap 'echo \$SECONDS >\"$LOGS/$part.took\"' EXIT; run_$part" \
      >"$LOGS/$part" 2>&1 &
    pid+=($!)
  done
  for part in "$@"; do
    result=ok
    if ! wait "${pid[i++]}"; then
      result=FAILED
      FAILED=1
      tail -n 40 "$LOGS/$part"
    fi
    took=$(cat "$LOGS/$part.took" 2>/dev/null || echo $((SECONDS_FOR[$part] + GRACE))) # Killed.
    [[ $# -eq 1 ]] || echo "-- $part" >>"$OUT/log.txt"
    cat "$LOGS/$part" >>"$OUT/log.txt"
    line=$(printf '%-9s %-7s %4d s  %s' "$part" "$result" "$took" "$(notes "$part" || true)")
    echo "$line"
    RESULTS+=("$line")
  done
}

export -f measure
for part in "${!SECONDS_FOR[@]}"; do
  export -f "run_$part"
done

{
  echo "== environment"
  environment
} 2>&1 | tee -a "$OUT/log.txt"

LEFT_OUT=()
seen=" "
for next in "${PARTS[@]}"; do
  beside=()
  for part in "${PARTS[@]}"; do
    if [[ $seen != *" $part "* ]] &&
      [[ $part == "$next" || ($CHECKS == *" $next "* && $CHECKS == *" $part "*) ]]; then
      seen+="$part "
      if ((SECONDS + SECONDS_FOR[$part] + GRACE + SECONDS_FOR[verdict] <= BUDGET)); then
        beside+=("$part")
      else
        LEFT_OUT+=("$part")
      fi
    fi
  done
  [[ ${#beside[@]} -eq 0 ]] || run_beside "${beside[@]}"
done
rm -f "$OUT/verdict.txt"
if compgen -G "$OUT/*.json" >/dev/null; then
  run_beside verdict
fi

{
  echo "== results"
  printf '%s\n' "${RESULTS[@]}"
  if [[ ${#LEFT_OUT[@]} -gt 0 ]]; then
    echo "== left out, $BUDGET s are too few: ${LEFT_OUT[*]}"
    # On a fresh machine it has to be built again, on this one the module is there.
    if [[ " ${PARTS[*]} " == *" build "* && " ${LEFT_OUT[*]} " != *" build "* ]]; then
      LEFT_OUT=(build "${LEFT_OUT[@]}")
    fi
    needed=$(($(bounds_of "${LEFT_OUT[@]}") + START + GRACE + SECONDS_FOR[verdict]))
    if ((needed > BUDGET)); then
      BUDGET=$needed
    fi
    ((BUDGET == UNASKED)) || COMMAND+=(--seconds "$BUDGET")
    printf '%q ' "${COMMAND[@]}" "$GIVEN_OUT" "${LEFT_OUT[@]}"
    echo
  fi
} | tee -a "$OUT/log.txt"
if [[ -f $OUT/verdict.txt ]]; then
  cat "$OUT/verdict.txt"
fi
exit "$FAILED"
