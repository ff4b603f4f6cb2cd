# make bench, make test: the two commands of README.md.
# With VENV= (empty) the Python at hand is used and nothing is downloaded.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
FRAMEWORKS ?= .venv-frameworks
# The oldest torch that is supported, which PyPI has built for CUDA.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0
OUT ?= bench/out
BENCH_ARGS ?=
PYTEST_ARGS ?=

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  PRETEND_PY := $(PYTHON)
  TOOLS :=
else
  PRETEND_PY := $(CUDA_VENV)/bin/python
  PRETEND_READY := $(CUDA_VENV)/.ready
  PY := $(VENV)/bin/python
  TOOLS := $(VENV)/bin/
  READY := $(VENV)/.ready
  LINT_READY := $(VENV)/.lint-ready
  DOCS_READY := $(VENV)/.docs-ready
endif
# Of whichever Python a target names.
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
# What pyproject.toml lists as an extra or a group, so that each version stands there alone.
EXTRA = $(PY) -c 'import sys, tomllib; all = tomllib.load(open("pyproject.toml", "rb")); lists = all["project"]["optional-dependencies"] | all["dependency-groups"]; print(*(name for wanted in sys.argv[1:] for name in lists[wanted]), sep="\n")'
CXX_FILES = find csrc bench tests/host tests/sanitize tests/pretend -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: bench test test-frameworks sanitize gpu-sanitize pretend-gpu build wheel site docs lint format clean

bench: build
	mkdir -p $(OUT)
	$(PY) -m bench --json $(OUT)/bench.json --plot $(OUT)/bench $(BENCH_ARGS)
	$(PY) -m bench manager --json $(OUT)/manager.json
	$(PY) -m bench train --json $(OUT)/train.json --plot $(OUT)/train

test: build
	$(PY) -m pytest $(PYTEST_ARGS)

# The hooks inside the real frameworks.
test-frameworks: build $(FRAMEWORKS)/.ready
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks $(PYTEST_ARGS)

# The CPU kernels, and the CUDA kernels' own code on the host, under g++'s sanitizers.
sanitize: $(READY)
	$(PY) tests/sanitize/sanitize.py build/sanitize

# The CUDA kernels under NVIDIA's, on a machine with a GPU.
gpu-sanitize: $(READY)
	$(PY) tests/sanitize/sanitize.py build/sanitize --gpu

# The tests marked "cuda" without a GPU, in an environment whose torch was built for CUDA; with
# VENV= in that of PYTHON, which must have one.
pretend-gpu: $(PRETEND_READY)
	$(PRETEND_PY) tests/pretend/run.py pytest --require-cuda -m cuda $(PYTEST_ARGS)

# Building is required here: a broken compiler must not turn into a green run of the fallback.
build: $(READY)
	FUSED_EMA_BUILD=require $(PY) setup.py --quiet build_ext --inplace

# dist/*.whl, with the kernels in it, and seen to work where it is installed.
wheel: $(READY)
	rm -f dist/*.whl
	FUSED_EMA_BUILD=require $(PY) -m pip --quiet wheel . --no-deps --no-build-isolation --wheel-dir dist
	$(PY) tests/installed.py dist/*.whl

# The site, in build/docs.
site: build $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

# And every code block of it is run.
docs: site
	$(PY) -m pytest --quiet tests/test_docs.py

lint: $(READY) $(LINT_READY)
	$(TOOLS)ruff check .
	$(TOOLS)ruff format --check .
	$(CXX_FILES) | xargs $(TOOLS)clang-format --dry-run --Werror
	$(PY) -m mypy
	$(PY) -m mypy tests/user_program.py

format: $(READY) $(LINT_READY)
	$(TOOLS)ruff check --fix-only .
	$(TOOLS)ruff format .
	$(CXX_FILES) | xargs $(TOOLS)clang-format -i

clean:
	rm -rf build dist bench/out fused_ema/*.so fused_ema/_build_info.json

# torch first and pinned, so that no other requirement picks another build of it.
$(VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77"
	$(EXTRA) build test bench | xargs -d '\n' $(PIP)
	touch $@

# The Python of the other environment, so that one build serves both.
$(FRAMEWORKS)/.ready: PY := $(FRAMEWORKS)/bin/python
$(FRAMEWORKS)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(FRAMEWORKS)
	$(PIP) $(TORCH) "setuptools>=77,<81" wheel
	$(EXTRA) frameworks-alone | MMCV_WITH_OPS=0 xargs -d '\n' $(PIP) --no-deps --no-build-isolation
	$(EXTRA) frameworks | xargs -d '\n' $(PIP)
	$(EXTRA) frameworks-beside | xargs -d '\n' $(PIP) --no-deps --target $(FRAMEWORKS)/beside
	touch $@

$(CUDA_VENV)/.ready: PY := $(CUDA_VENV)/bin/python
$(CUDA_VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(CUDA_VENV)
	$(PIP) $(CUDA_TORCH) "setuptools>=77"
	$(EXTRA) build test | xargs -d '\n' $(PIP)
	$(PY) -c 'import torch; assert torch.version.cuda, f"torch {torch.__version__} has no CUDA"'
	touch $@

$(VENV)/.lint-ready: $(VENV)/.ready
	$(EXTRA) lint | xargs -d '\n' $(PIP)
	touch $@

$(VENV)/.docs-ready: $(VENV)/.ready
	$(EXTRA) docs | xargs -d '\n' $(PIP)
	touch $@
