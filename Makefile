# The everyday commands. `make help` lists them; CMake does the work (CMakePresets.json), scripts/setup.sh brings what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
DEMO ?= runs/demo

# ccache takes precompiled headers only with these two; objects are shared by all clones of one user.
export CCACHE_SLOPPINESS := pch_defines,time_macros
export CCACHE_BASEDIR := $(CURDIR)

PYTHON := .venv/bin/python
CPP_FILES = $(shell find src tests bench -name '*.cc' -o -name '*.h')
PYTHON_FOLDERS := python scripts bench
LINT ?= $(shell find src -name '*.cc')

.PHONY: help setup build test demo bench format check-format lint ladder sanitize threads fuzz kills install clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup:  ## Debian packages, .venv and Highway: only what is missing
	@scripts/setup.sh

.PHONY: configured
configured: setup
	@[[ build/build.ninja -nt CMakePresets.json && build/build.ninja -nt .venv/setup.stamp ]] || cmake --preset release

build: configured  ## the programs, the library of operators, the tests
	@cmake --build --preset release --parallel $(JOBS)

test: build  ## every test: C++, Python, the ladder, an installed copy
	ctest --test-dir build --output-on-failure --no-tests=error

demo: configured  ## checks the kernels, trains on Shakespeare, converts SmolLM2: curves, tables, text, in ten minutes
	@cmake --build --preset release --parallel $(JOBS) --target latte latte-torch
	@scripts/demo.sh $(DEMO)

bench: build  ## attention against torch's scaled_dot_product_attention
	build/latte bench attention

format: setup  ## clang-format and ruff, in place
	clang-format -i $(CPP_FILES)
	$(PYTHON) -m ruff check --fix $(PYTHON_FOLDERS)
	$(PYTHON) -m ruff format $(PYTHON_FOLDERS)

check-format: setup  ## fails where `make format` would change something
	clang-format --dry-run -Werror $(CPP_FILES)
	$(PYTHON) -m ruff check $(PYTHON_FOLDERS)
	$(PYTHON) -m ruff format --check $(PYTHON_FOLDERS)
	$(PYTHON) -m pre_commit validate-config .pre-commit-config.yaml

# All of src takes some 20 minutes of processor time; LINT names other files. clang has no omp.h beside GCC's OpenMP.
lint: setup  ## clang-tidy over src, or over LINT="files"
	@cmake --preset lint --log-level=ERROR -Wno-deprecated >/dev/null
	@printf '%s\0' $(LINT) | xargs -0 -n 1 -P $(JOBS) clang-tidy -p build-lint --quiet --extra-arg=-fno-openmp \
	  2> >(grep -v 'warnings\? generated' >&2)

ladder:  ## fails where a rung of the ladder includes a higher one
	@python3 scripts/check_ladder.py

sanitize: setup  ## kernels and formats under the address and undefined-behaviour sanitizers
	@cmake --preset asan-ubsan
	@cmake --build --preset asan-ubsan --parallel $(JOBS)
	ctest --test-dir build-asan --output-on-failure --no-tests=error

threads: setup  ## kernels on several threads under the thread sanitizer
	@cmake --preset tsan
	@cmake --build --preset tsan --parallel $(JOBS) --target latte_kernels_test
	build-tsan/latte_kernels_test --gtest_filter='Threads.*' --gtest_brief=1

fuzz: setup  ## every parser of files under libFuzzer, a minute each
	@scripts/fuzz.sh 60

kills: build  ## kill -9 at 50 moments of training on a text, and at 50 on a task
	$(PYTHON) scripts/kill_training.py --kills 50
	$(PYTHON) scripts/kill_training.py --kills 50 --task

install: build  ## to PREFIX (/usr/local)
	cmake --install build --prefix "$(PREFIX)"

clean:  ## removes build folders; .venv, .deps and runs stay
	rm -rf build build-asan build-tsan build-fuzz build-lint build-package
