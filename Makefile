# make bench, make test: the two commands of README.md.
# With VENV= (empty) the Python at hand is used and nothing is downloaded.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

OUT ?= bench/out
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: build bench test lint format clean

# torch first and pinned, so that no later requirement picks another build of it.
$(VENV)/.ready: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" wheel
	$(PY) -m pip install --quiet --disable-pip-version-check ninja "pybind11>=2.13" numpy pytest matplotlib rich
	touch $@

# Building is required here: a broken compiler must not turn into a green run on the fallback.
build: $(READY)
	FUSED_EMA_BUILD=require $(PY) setup.py --quiet build_ext --inplace

bench: build
	mkdir -p $(OUT)
	$(PY) -m bench --json $(OUT)/bench.json --plot $(OUT)/bench $(BENCH_ARGS)

test: build
	$(PY) -m pytest $(PYTEST_ARGS)

$(VENV)/.lint: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check ".[lint]" --no-deps --dry-run >/dev/null
	touch $@

lint: lint-tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(dir $(PY))clang-format --dry-run --Werror
	$(PY) -m mypy

format: lint-tools
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(dir $(PY))clang-format -i

clean:
	rm -rf build fused_ema/*.so fused_ema/_build_info.json bench/out
