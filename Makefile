# make demo and make test set up all they need: Python 3.11 and pip are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-ci test-engines lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/moesaic demo moesaic-demo

test: lint
	$(PYTEST) -m "not long and not engines"

# What takes minutes: counts in the thousands, loads, whole commands. Run after `make test`.
test-ci: lint
	$(PYTEST) -m "long and not engines"

# Installs stock engines into environments of their own (some gigabytes), and opens in them what moesaic writes.
test-engines: $(VENV)/test.stamp .venv-mlx/installed .venv-vllm/installed
	$(BIN)/python -m pytest -m engines tests/engines --loads build/loads.json \
		--mlx-python $(CURDIR)/.venv-mlx/bin/python --vllm-python $(CURDIR)/.venv-vllm/bin/python

.venv-%/installed: tests/engines/install.py
	$(PYTHON) tests/engines/install.py $* .venv-$*
	touch $@

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e .[test]
	touch $@

clean:
	rm -rf $(VENV) .venv-mlx .venv-vllm moesaic-demo build *.egg-info
