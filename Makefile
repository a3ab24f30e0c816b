# Everything from a fresh machine that has Python 3.11 or newer and make.
#
#   make demo                 train a small model with four mistakes in it, and read what GradWatch says
#   make demo ARGS=--fixed    the same model without the mistakes
#   make test                 the whole test suite, with coverage
#
# The first call of either makes .venv and installs into it; later calls start at once.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python that makes the virtual environment, say PYTHON=python3.12; unset, the first one that is new enough.
PYTHON ?=
# More arguments for pip, say an index that has CPU builds of torch.
PIP_ARGS ?=
# Arguments for the demo: --fixed, --strict, --epochs N, --log-dir DIR.
ARGS ?=
# Arguments for pytest, say TESTS="tests/test_rules.py -k streak" (then without the coverage gate).
TESTS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(VENV)/.torch-installed
RUN := $(VENV)/.run-installed
DOCS := $(VENV)/.docs-installed
DEV := $(VENV)/.dev-installed
BENCH := $(VENV)/.bench-installed

.PHONY: help
help:  ## Say what can be made.
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1|\2/' | while IFS='|' read -r name text; do \
		printf '  %-16s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(RUN)  ## Train on real images and print the diagnoses; ARGS="--fixed" or "--strict".
	@$(BIN)/python examples/digits.py $(ARGS)

.PHONY: test
test: $(RUN)  ## Run the test suite with branch coverage; TESTS="..." for a part of it.
ifeq ($(strip $(TESTS)),)
	@$(BIN)/python -m pytest --cov --cov-report=term
else
	@$(BIN)/python -m pytest $(TESTS)
endif

.PHONY: docs
docs: $(DOCS)  ## Build the documentation into site/; a warning fails it.
	@# Not with --quiet, which hides warnings from --strict too.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

.PHONY: check
check: lint types contracts docs test  ## Run everything that CI runs.

.PHONY: lint
lint: $(DEV)  ## Check style, format and spelling.
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/codespell

.PHONY: types
types: $(DEV)  ## Check the types.
	@$(BIN)/python -m mypy

.PHONY: contracts
contracts: $(DEV)  ## Check which room imports which.
	@$(BIN)/lint-imports

.PHONY: bench
bench: $(BENCH)  ## Measure what watching costs beside other ways; ARGS=--quick for a look.
	@$(BIN)/python benchmarks/overhead.py $(ARGS)

.PHONY: clean
clean:  ## Remove the environment, the caches and what the demo wrote.
	rm -rf $(VENV) runs lightning_logs build dist site htmlcov .coverage .coverage.*
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find gradwatch tests examples -name __pycache__ -type d -exec rm -rf {} +

# Each stamp is newer than what was installed from; with nothing changed, pip is not even started.

$(TORCH): constraints.txt
	@python=; \
	for candidate in $(if $(strip $(PYTHON)),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "error: $(if $(strip $(PYTHON)),'$(PYTHON)' is no Python 3.11 or newer,no Python 3.11 or newer found); install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "Making the virtual environment $(VENV) with $$("$$python" --version) ..."; \
		rm -rf $(VENV); \
		if ! "$$python" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "error: this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; fi; fi
	@echo "Installing torch (the largest part; one to five minutes the first time) ..."
	@$(PIP) install $(PIP_ARGS) -c constraints.txt torch
	@touch $@

$(RUN): $(TORCH) pyproject.toml
	@echo "Installing GradWatch, Lightning, TensorBoard and the test tools (about a minute) ..."
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[test,examples,cli]"
	@touch $@

$(DOCS): $(RUN)
	@echo "Installing what builds the documentation (a few seconds) ..."
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[docs]"
	@touch $@

$(DEV): $(RUN)
	@echo "Installing the linters and the type checker (half a minute) ..."
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

$(BENCH): $(RUN)
	@echo "Installing what is measured beside GradWatch (a minute) ..."
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[bench]"
	@touch $@
