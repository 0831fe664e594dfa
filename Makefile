# Each target sets up what it needs in .venv by itself, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo devices-demo test test-devices test-attacks check bench

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/fedtune simulate recipes/sentiment.yaml

devices-demo: .venv/ready
	$(BIN)/python -m benchmarks.devices_demo

test: .venv/ready
	$(BIN)/python -m pytest

test-devices: .venv/ready
	$(BIN)/python -m pytest -m deployed

test-attacks: .venv/ready
	$(BIN)/python -m tests.attacks

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	$(BIN)/python -m benchmarks
