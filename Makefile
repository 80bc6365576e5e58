# make demo, make test: everything a fresh machine with Python 3.11 and a C++20 compiler needs.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: core
core: ## development build of the native core, into the source tree
	@mkdir -p build
	@flock build/.lock bash -c 'cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(abspath $(BIN)/python) >build/cmake.log 2>&1 || { cat build/cmake.log; exit 1; }; cmake --build build/dev && cp build/dev/_core*.so fi_backend/'
