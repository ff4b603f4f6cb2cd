#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the CUDA tests, on a machine with a GPU and the package built.
#
#   bash tests/gpu_sanitize.sh [NUM_TESTS [TOOL...]]
#
# A sanitizer slows kernels down many times, so it gets NUM_TESTS of their tests (24), spread over
# all files; the tools are memcheck, racecheck, initcheck and synccheck unless named. PYTHON is the
# Python that has torch. Without torch's allocator every tensor is an allocation of its own, and a
# write past it is seen.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
NUM_TESTS=${1:-24}
TOOLS=("${@:2}")
[[ ${#TOOLS[@]} -gt 0 ]] || TOOLS=(memcheck racecheck initcheck synccheck)

sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$(command -v nvcc)")/compute-sanitizer")
if [[ ! -x $sanitizer ]]; then
  echo "no compute-sanitizer here: nothing checked" >&2
  exit 2
fi
mapfile -t ids < <("$PYTHON" -m pytest -m cuda -k "not foreach" --ignore=tests/test_bench.py \
  --collect-only -q | grep '::')
if [[ ${#ids[@]} -eq 0 ]]; then
  echo "no CUDA tests found" >&2
  exit 1
fi
spread=()
for ((i = 0; i < ${#ids[@]}; i += (${#ids[@]} + NUM_TESTS - 1) / NUM_TESTS)); do
  spread+=("${ids[i]}")
done
for tool in "${TOOLS[@]}"; do
  echo "== $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest --require-cuda -q -p no:cacheprovider "${spread[@]}"
done
