# Two commands for people: `make demo` runs the main job, `make test` checks everything. Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python -m sdguard.testbed.demo --out out

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# some tests run several processes, whose threads would otherwise spin while they wait for a core
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q
