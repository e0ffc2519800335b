# Two commands on a fresh machine, with nothing but python3 (venv included) and make: `make demo` and `make test`.
# PYTHON names the Python that makes the environment, VENV the folder it lies in: make test VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.dinosearch-installed

.PHONY: demo test test-all check format clean

demo: $(INSTALLED)
	$(BIN)/python -m dinosearch demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# The stamp is as old as the last finished install, so a broken one is done again and a changed pyproject.toml is noticed.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dinosearch needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[dev]"
	@touch $@

# Never $(VENV): it may be someone's own. models/ and indexes/ are work, not rubbish.
clean:
	rm -rf .venv build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
