# `make demo`, `make serve-demo` and `make test` set everything up first: a virtual environment with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo serve-demo test lint types check gpu-check compile-check clean

setup: $(STAMP)

$(STAMP): requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "zipvl-kernels needs Python 3.11 to 3.13: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## answer held-out questions dense and with ZipVL, write out/demo/
	$(BIN)/zipvl demo

serve-demo: $(STAMP)  ## serve held-out questions from one pool of pages, dense and with ZipVL, write out/serve/
	$(BIN)/python examples/serving.py

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

# The two below need more than `make test` has: a GPU, or minutes. PYTHON_GPU: an interpreter whose torch sees the GPU.
PYTHON_GPU ?= $(BIN)/python

gpu-check: $(if $(filter $(BIN)/python,$(PYTHON_GPU)),$(STAMP))  ## every operator and backend on this machine's GPU, writes bench/results/GPU/check.json
	PYTHONPATH=.:adapters:reference:tests $(PYTHON_GPU) tests/gpu/check.py

compile-check: $(STAMP)  ## every kernel and configuration for every target, without a GPU
	ZIPVL_COMPILE_ALL=1 $(BIN)/python -m pytest tests/test_compile_targets.py

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
