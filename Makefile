# A fresh clone needs Python 3.11 or newer and make. Every target installs what it needs into $(VENV), once.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest
APPLY := $(VENV)/bin/kvpolicy apply
# 615 prompt tokens with the chat template, and enough new ones that both policies of the demo evict. Sampled, because a
# model this small soon repeats itself when it is greedy, under the full cache too. The demo fails where nothing is evicted.
STORY := -f kvpolicy/models/prompts/demo.txt --max-new-tokens 256 --temperature 0.7 --must-evict
WORKERS ?= 2

# Two workers with one thread each beat one worker with two, and keep the order of float sums the same everywhere.
test test-offline test-all fuzz: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-offline test-all fuzz matrix check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## watch RaaS and SCOPE keep a real model's cache inside a budget
	@echo "A real model of 135M parameters reads a story of 615 tokens and answers a question, first under RaaS, then under SCOPE."
	@echo "Each keeps its cache inside a budget that the text exceeds; the table after each text says what was kept and what left."
	@echo
	$(APPLY) raas builtin:smollm2 $(STORY) --set budget=704
	@echo
	$(APPLY) scope-discontinuous builtin:smollm2 $(STORY) --set alpha=512 --set beta1=64 --set beta2=64

test: $(VENV)/.dev ## everything that CI runs; fetches SmolLM2 (98 MB) once
	$(PYTEST) -n $(WORKERS) -m "not slow"

test-offline: $(VENV)/.dev ## the same without the tests that need SmolLM2
	$(PYTEST) -n $(WORKERS) -m "not slow and not smollm2"

test-all: $(VENV)/.dev ## the slow tests too
	$(PYTEST) -n $(WORKERS)

# For a night: random policies under random attention, mutated texts, and broken copies of the runtime.
CASES ?= 20000
TEXTS ?= 200000
SEED ?= 0

fuzz: $(VENV)/.dev ## search for counter-examples (CASES=20000 TEXTS=200000 SEED=0), and break the runtime to see it caught
	$(VENV)/bin/python -m kvpolicy.lab.fuzz --cases $(CASES) --texts $(TEXTS) --seed $(SEED) --workers $(WORKERS)
	$(VENV)/bin/python -m tests.mutation.check

# An environment for each pair of versions under build/matrix, made once. Of torch, pip takes what it takes anywhere: on
# Linux a build with CUDA, some gigabytes, unless its own settings name a folder with one for the CPU.
matrix: ## test the oldest and newest transformers and torch, and record it (TRANSFORMERS="5.1.0 5.2.0" TORCH=2.13.0)
	$(PYTHON) -m tests.matrix.run $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS)) $(if $(TORCH),--torch $(TORCH))

check: $(VENV)/.dev ## lint, formatting, and types of the installed wheel
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	rm -rf build/check build/lib build/bdist.* && mkdir -p build/check/wheel
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir build/check/wheel .
	$(PIP) install --quiet --no-deps --target build/check/site build/check/wheel/*.whl
	cd build/check && MYPYPATH=site $(abspath $(VENV))/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p kvpolicy

clean: ## remove everything that these targets made, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# torch goes first and exactly: asked for as a range, it may bring a newer build and gigabytes of CUDA with it.
$(VENV)/.run: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	@echo "installing kvpolicy into $(VENV); the first time takes a minute or two"
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kvpolicy needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
