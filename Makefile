# make train: the default job.  make test: everything that a machine without a GPU can check.
# Both create .venv first, from the versions in constraints.txt; nothing but python3 (3.11 or 3.12) is needed.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# A .venv that is a link is somebody else's, who says what is in it: to install there would put this folder in it.
INSTALLED := $(if $(shell test -L .venv && test -x $(BIN)/python && echo linked),,.venv/installed)

.PHONY: train test lint soak test-gpu compile-check docs constraints clean

train: $(INSTALLED)
	@$(BIN)/python train.py $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@echo "Installing into .venv (a minute or two; on a machine with a GPU several GB) ..."
	@$(PYTHON) -m venv .venv
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>&1 | { grep -v WARNING || true; }
	@touch $@

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	TMPDIR="$$tmp" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --durations=15 $(ARGS)

soak: $(INSTALLED)
	@FAULT_KILLS=50 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runs tests/data/test_prepare.py tests/data/test_tokenizer.py -k 'killed or eight_ranks' --timeout 3600 $(ARGS)

test-gpu: $(INSTALLED)
	@$(BIN)/python -m pytest -m "gpu and not alone" -n 8 $(ARGS)
	@$(BIN)/python -m pytest -m "gpu and alone" $(ARGS)

compile-check: $(INSTALLED)
	@$(BIN)/python scripts/compile_check.py --triton 3.6.0 3.9.0 $(ARGS)

docs: $(INSTALLED)
	@$(BIN)/python -m configs.reference > docs/configuration.md

constraints: $(INSTALLED)
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
