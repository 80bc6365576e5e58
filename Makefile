# make demo, make test: everything a fresh machine with Python 3.11 and a C++20 compiler needs.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STEP := .ci/step
# Of make demo: vllm or sglang, and the interpreter that has it.
ENGINE ?= vllm
PYTHON_OF_vllm = $(BIN)/python
PYTHON_OF_sglang = PYTHONPATH=$(CURDIR)/tests/sglang_cpu SGLANG_USE_CPU_ENGINE=1 $(VENV)-sglang/bin/python
# Where test-gpu leaves tests-<gpu>.json, which is committed.
EVIDENCE ?= e2e_bench/results
CXX_FILES = $(shell find kernels -name '*.h' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')

.NOTPARALLEL:
.PHONY: help demo test lint test-gpu core env clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: env core ## vLLM, or with ENGINE=sglang SGLang, serves a small model; results in demo_output/
	@$(PYTHON_OF_$(ENGINE)) -m e2e_bench.demo --engine $(ENGINE)

test: env core lint ## environment, core, lint, then every test that needs no GPU
	@echo "==> tests of planner, kernels, package and adapters"
	@$(BIN)/python -m pytest tests/unit tests/cpu tests/adapters
	@echo "==> tests through the real engines"
	@$(BIN)/python -m pytest tests/engines
	@echo "==> tests of the SGLang adapter, and through real engines"
	@$(PYTHON_OF_sglang) -m pytest tests/adapters_sglang tests/engines_sglang
	@echo "==> results of other machines: a stale one is no failure"
	@$(BIN)/python -m e2e_bench evidence

lint: env ## ruff, mypy --strict, clang-format
	@$(STEP) "ruff check" $(BIN)/ruff check .
	@$(STEP) "ruff format" $(BIN)/ruff format --check .
	@$(STEP) "mypy --strict" $(BIN)/mypy -p fi_backend
	@$(STEP) "clang-format" $(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# With a BIN of your own (make test-gpu BIN=/opt/torch/bin) nothing is installed or built.
test-gpu: $(if $(filter $(VENV)/bin,$(BIN)),env core) ## tests/cuda and compute-sanitizer, on a machine with an NVIDIA GPU
	@$(BIN)/python -m fi_backend doctor --require gpu
	@echo "==> tests of the GPU path"
	@FI_EVIDENCE=$(EVIDENCE) $(BIN)/python -m pytest tests/cuda
	@echo "==> the kernels under compute-sanitizer"
	@$(BIN)/python tests/sanitize.py --evidence $(EVIDENCE)

env: ## the virtual environments of requirements/, made once per change of the locks
	@.ci/env $(PYTHON) $(VENV)

core: ## development build of the native core, into the source tree
	@$(STEP) "native core" .ci/core $(abspath $(BIN)/python)

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist demo_output fi_backend/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
