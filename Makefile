# `make demo`: the whole thing on two cores. `make test`: every check. Both make .venv and install what is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export RAY_AUTH_MODE := disabled
export DENSEBRIDGE_ENVIRONMENTS := $(CURDIR)/$(VENV)/environments

.PHONY: demo test lint install clean

demo: install
	$(BIN)/python -m examples.shapes.demo

test: install lint
	$(BIN)/python -m jobs.clip_retrieval.environment # clip-retrieval's own; made once, so that no test waits for it or goes without
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build
