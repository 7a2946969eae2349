# make demo and make test set up all they need: Python 3.11 and pip are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-engines lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/moesaic demo moesaic-demo

test: lint
	$(BIN)/python -m pytest -m "not long and not engines"

test-all: lint
	$(BIN)/python -m pytest -m "not engines"

# Needs stock engines installed; see tests/engines/README.md.
test-engines: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m engines tests/engines $(ENGINES)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .[test]
	touch $@

clean:
	rm -rf $(VENV) moesaic-demo build *.egg-info
