# widehead: `make demo` trains and asks the place resolver, `make test` runs every test; both begin on a bare machine
#
#   make demo    build, install without PyTorch, train on a million place names, show the results
#   make test    build and install with everything, run the C++ and the Python tests
#   make bench   BENCH=dense ARGS="..."   a benchmark of bench/
#   make gpu     on a machine with an NVIDIA GPU, offline: builds with CUDA, tests, measures; ARGS=bench for one step of it
#   make lint    style and types            make format   put the style right
#   make venv    only the virtual environment, with the package and all its extras
#   make clean   remove what was built (the virtual environment stays; `rm -r .venv` removes it)
SHELL := /bin/bash
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
BENCH ?= dense
ARGS ?=

# Whatever the installed package is made of. Folders count too: they change when a file goes.
SOURCES := CMakeLists.txt pyproject.toml $(wildcard README.md LICENSE) \
  $(shell find cmake cpp python -not -path '*/__pycache__*' -not -name '_core*.so' 2>/dev/null)
CXX_FILES = $(shell git ls-files -co --exclude-standard '*.cc' '*.h' '*.cu' '*.cuh')

# Only on behalf of the build: pip takes the compiler's jobs from here.
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PYTHON JOBS

.PHONY: demo test bench gpu lint lint-format lint-ruff lint-types format clean venv preflight
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '1,/^SHELL/{s/^# \{0,1\}//p}' Makefile

demo: preflight $(VENV)/.stamp-demo
	@$(VENV)/bin/widehead demo $(ARGS)

test: preflight $(VENV)/.stamp-test
	@scripts/run_tests.sh $(VENV) $(ARGS)

bench: preflight $(VENV)/.stamp-test
	$(PY) bench/$(BENCH).py $(ARGS)

# With the python3 of that machine, which has a CUDA build of PyTorch; neither .venv nor a package index is used.
gpu:
	@$(PYTHON) scripts/gpu.py $(ARGS)

venv: preflight $(VENV)/.stamp-test $(VENV)/.stamp-lint

# `make -k lint` goes on after the first that fails.
lint: lint-format lint-ruff lint-types

lint-format: $(VENV)/.stamp-lint
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
lint-ruff: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check .
# With the package's extras beside it, for their types.
lint-types: $(VENV)/.stamp-test $(VENV)/.stamp-lint
	$(VENV)/bin/mypy

format: preflight $(VENV)/.stamp-lint
	$(VENV)/bin/clang-format -i $(CXX_FILES)
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build dist
	rm -f $(VENV)/.stamp-demo $(VENV)/.stamp-test

preflight:
	@scripts/preflight.sh

# Each stamp stands for an installation; it is renewed when what went into it changes.
$(VENV)/.stamp-tools: requirements/build.txt $(CONSTRAINTS)
	@scripts/preflight.sh
	@echo "==> Creating $(VENV) with the tools of the build"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c $(CONSTRAINTS) -r requirements/build.txt
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-tools $(SOURCES)
	@echo "==> Building and installing widehead with what the demo needs (about a minute the first time)"
	$(call install,".[demo]")
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-tools requirements/test.txt $(SOURCES)
	@echo "==> Building and installing widehead with PyTorch and the tools of the tests (minutes the first time)"
	$(call install,".[torch$(,)sklearn$(,)plot$(,)demo]" -r requirements/test.txt)
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-tools requirements/lint.txt
	$(PIP) install --quiet -c $(CONSTRAINTS) -r requirements/lint.txt
	@touch $@

, := ,
# Without isolation the objects of the last build are found again (build/{wheel_tag}); the tools are pinned in the environment.
define install
@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install --no-build-isolation -c $(CONSTRAINTS) $(1)
endef
