# Every target installs what it needs first; nothing else is required than python3 >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
# Images of containers set it, and then every process compiles all that it imports: 15 s more, each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-next check tables pins clean

help:  ## list these targets
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# uv resolves and links ten times faster than pip; pip brings it, so pip is all a fresh machine needs.
# constraints.txt holds the versions that the tests last passed with, so that next year's releases break nothing here.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

install: .venv/installed  ## create .venv with clipfix and its development tools in it

run: install  ## repair the tiny CLIP on the drawn world: a before/after table and a folder of pictures
	$(BIN)/python -m clipfix

# Whole files go to each worker, as the tests of a file share what they prepare; tests/conftest.py sorts them.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: install  ## run the tests, but for the slow ones
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: install  ## run all tests, slow ones too
	$(BIN)/python $(PYTEST)

# Beside the bounds of pyproject.toml. Torch and the rest stay at their newest releases.
NEXT := open_clip_torch transformers diffusers lightning
test-next:  ## run the tests on the newest pre-releases of open_clip, transformers, diffusers and lightning
	$(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --quiet uv
	.venv-next/bin/uv pip install --quiet --python .venv-next/bin/python -e '.[dev]'
	.venv-next/bin/uv pip install --python .venv-next/bin/python --prerelease=allow \
		$(NEXT:%=--upgrade-package %) $(NEXT)
	.venv-next/bin/python $(PYTEST) -m "not slow"

check: install  ## formatting, lint, types, import contracts and dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/audit.py

tables: install  ## README's tables from benchmarks/results
	$(BIN)/python benchmarks/tables.py

pins: install  ## move constraints.txt to the newest versions that fit together
	$(BIN)/uv pip compile --quiet --universal --upgrade --all-extras --no-emit-index-url --no-annotate --no-header \
		pyproject.toml --output-file constraints.txt

clean:  ## remove the environment, runs and generated scenes
	rm -rf .venv .venv-next outputs data/scenes
