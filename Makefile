# make demo: train the embedded model end to end.   make test: everything that must hold.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit lint format types check clean

demo: .venv/.installed
	$(BIN)/rollahead run --out runs/demo

test: .venv/.installed-test
	$(BIN)/python -m pytest

unit: .venv/.installed-test
	$(BIN)/python -m pytest tests/unit -m "not slow"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

.venv/.installed-dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ .venv/.installed .venv/.installed-test
