# `make demo` and `make test` work from a fresh clone: they make .venv, install into it, and run.
# PYTHON=python3.12 chooses the Python that .venv is made with. PY=/path/to/python uses that Python as it is, with
# nothing installed: for machines that already have everything.

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifdef PY
RUNTIME :=
DEVELOPMENT :=
else
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
endif

DEMO = $(PY) -m headrace.cli generate examples/prompts.jsonl -o out/completions.jsonl --temperature 0.6 --max-tokens 64 --seed 1 --compare
TEST_ALL_OUTPUT := docs/benchmarks/test-all.txt
PYTEST_ARGS ?=
# Processes of `make test` and `make test-all`, and those that share the GPU in `make test-gpu`, each with a
# context of its own.
CORES ?= 2
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 8); echo $$((n < 12 ? n : 12)))
MACHINE := "from headrace.bench.report import headline, machine; print(headline(machine()))"
LINT_IMPORTS := "from importlinter.cli import lint_imports_command as lint; lint(['--no-logo'])"

# $(call part,name,command): run a part of the checks, say how long it took, stop if it fails.
define part
@echo "== $(1)"; began=$$(date +%s); $(2) && echo "== $(1): $$(( $$(date +%s) - began )) s"
endef

.PHONY: help demo install test lint docs test-all test-gpu bench clean distclean

help:
	@echo "make demo      install and complete the example prompts with the bundled model"
	@echo "make test      linter, types, import contract, documents, tests (20 minutes at most on two cores)"
	@echo "make test-all  the same with the long runs; writes $(TEST_ALL_OUTPUT)"
	@echo "make test-gpu  the tests that need a GPU and the suites of the engine on it; one that is skipped fails"
	@echo "make lint      linter, types and import contract only"
	@echo "make docs      write the generated pages of docs/ again"
	@echo "make bench     measure on this machine"
	@echo "make clean     remove what runs and tools wrote; make distclean removes $(VENV) too"

demo: $(RUNTIME)
	@$(DEMO)

install: $(RUNTIME)

test: lint
	$(call part,generated documents,$(PY) -m tools.make_docs --check)
	@echo "== tests"
	@$(PY) -m pytest -n $(CORES) $(PYTEST_ARGS)

lint: $(DEVELOPMENT)
	$(call part,ruff check,$(PY) -m ruff check .)
	$(call part,ruff format,$(PY) -m ruff format --check .)
	$(call part,mypy,$(PY) -m mypy)
	$(call part,import contract,$(PY) -c $(LINT_IMPORTS))

docs: $(DEVELOPMENT)
	@$(PY) -m tools.make_docs

test-all: lint
	@mkdir -p $(dir $(TEST_ALL_OUTPUT))
	@set -o pipefail; { date -u "+make test-all, %Y-%m-%d" && $(PY) -c $(MACHINE) && \
	    HYPOTHESIS_PROFILE=searching $(PY) -m pytest -n $(CORES) -m "not gpu" --durations=20 $(PYTEST_ARGS); } 2>&1 | tee $(TEST_ALL_OUTPUT)

test-gpu: $(DEVELOPMENT)
	@HEADRACE_REQUIRE_GPU=1 HEADRACE_TEST_DEVICE=cuda $(PY) -m pytest -m gpu -rs -n $(JOBS) --maxschedchunk=1 --durations=15 \
	    $(PYTEST_ARGS)

bench: $(RUNTIME)
	@$(PY) -m headrace.cli bench cpu

# The environment is made once; what is installed follows pyproject.toml. A stamp is written only after success.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$$($(PYTHON) --version) is too old, 3.11 is needed: name a newer one, e.g. make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: apt install python3-venv"; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-installed: tools/install_torch.py | $(VENV)/bin/python
	@$(PY) tools/install_torch.py
	@touch $@

$(VENV)/.runtime-installed: pyproject.toml | $(VENV)/.torch-installed
	@echo "== installing headrace"
	@$(PY) -m pip install -e .
	@touch $@

$(VENV)/.development-installed: pyproject.toml | $(VENV)/.torch-installed
	@echo "== installing headrace and the tools of its tests"
	@$(PY) -m pip install -e '.[dev]'
	@touch $(VENV)/.runtime-installed $@

clean:
	rm -rf out build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find headrace tests tools recipes -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) headrace.egg-info
