# Each target sets up what it needs in .venv by itself, once.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo devices-demo quick test test-devices test-attacks test-oldest check bench

# Modules are compiled when they are first imported: compiling them all takes longer than finding and unpacking them.
# What was compiled is kept, also where the environment says not to: tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS) --editable '.[dev,ray]'
	touch $(READY)

demo: $(READY)
	$(BIN)/fedtune simulate recipes/demo.yaml

devices-demo: $(READY)
	$(BIN)/python -m benchmarks.devices_demo

# The tests that a change needs, in under 90 seconds; BASE is the commit to compare with.
quick: $(READY)
	$(BIN)/python -m tests.quick $(BASE)

# One process per core and one more, at most four: many tests wait for processes that they start.
PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-devices: $(READY)
	$(BIN)/python -m pytest -m deployed

test-attacks: $(READY)
	$(BIN)/python -m tests.attacks

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-oldest:
	$(MAKE) test test-devices VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks
