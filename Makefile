# Everything sets itself up: Python 3.11 or newer and make are all a machine needs.
.DEFAULT_GOAL := help
.PHONY: help demo test laws lint mutants docs bench clean

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := overhead threads gan memory distributed scaling randomness reliability

help: ## show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train a GAN on handwritten digits; pictures go to runs/demo (about 30 s)
	$(BIN)/composefit demo

test: lint ## lint, types and tests
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -m "not full"

laws: $(VENV)/.tests $(VENV)/.recipes ## the laws over every recipe, strategy and number of ranks; docs/laws.md (about 25 min)
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -m full
	$(BIN)/python -m tests.laws.table

lint: $(VENV)/.tests ## lint and types alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

mutants: $(VENV)/.tests ## take each safeguard out of a copy; some test has to fail every time
	$(BIN)/python tests/mutants/run.py

docs: $(VENV)/.docs ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.benchmarks ## the tables of benchmarks/README.md, other trainers included
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done

clean: ## remove the environment, caches and built files
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# One stamp an extra: installed anew only when what is asked for has changed.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

# pip is the last thing that venv writes: where it is missing, the environment is not whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("composefit needs Python 3.11 or newer; this one is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
