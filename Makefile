# Every target sets up what it needs in .venv. It takes any Python from 3.10: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD := pyproject.toml setup.py constraints.txt $(wildcard build_backend/*.py)

# Compiled modules are kept whatever the environment says: the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint docs clean

help:
	@echo "make demo    train a small flow on handwritten digits and sample from it"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make docs    build the documentation site into build/site"
	@echo "make clean   remove .venv and everything that was built"

demo: .venv/installed
	$(BIN)/python examples/train_digits.py

# A process gets neighbouring tests, which share what is set up; when it has none left, it takes some from another.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

clean:
	rm -rf .venv build dist *.egg-info nflows_kconv/_native.abi3.so nflows_kconv/_native_build.json
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The Python sources run from the checkout; the native library is built again when its sources change.
# torch comes first: the build then uses it, and does not get one of its own. Little of the gigabytes is ever imported,
# and Python compiles that itself.
.venv/installed: $(NATIVE) $(BUILD) | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
