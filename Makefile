# Two commands for people: `make demo` runs the main job, `make test` checks everything but the demo's page in a browser, which is
# `make test-browser` and needs Debian's chromium. All set themselves up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo notebook app space docs test test-browser screenshots lint

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[files,demo,bench,dev,docs,browser]'
	touch $(STAMP)

demo: install
	TRANSFORMERS_VERBOSITY=error $(BIN)/python -m sdguard.testbed.demo --out out

# its cells anew, from the first to the last; what they give is kept in it
notebook: install
	$(BIN)/python -m benchmarks examples docs/notebook.ipynb

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# two workers of one thread each; some tests run more processes, whose threads would otherwise spin while they wait for a core
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2

# without a network; a warning is an error, and so is a name in a docstring that is nothing
docs: install
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -b html docs build/docs

app: install
	$(BIN)/python app.py

# a Space's own repository: space/ with the package beside it
SPACE ?= build/space
space:
	rm -rf $(SPACE)/sdguard
	mkdir -p $(SPACE)
	cp -R space/. sdguard LICENSE NOTICE $(SPACE)
	find $(SPACE) -name __pycache__ -prune -exec rm -r {} +

test-browser: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -s tests/browser

# the documentation's pictures of the page, from those that the browser tests took
screenshots: test-browser
	$(BIN)/python tests/browser/pictures_of_the_page.py
