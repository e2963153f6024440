# Everything runs in a virtual environment of the checkout's own, built from pyproject.toml by whatever needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo rounds test slow faults lint docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/.installed  ## set-up and training on shipped data: SQL in about a minute, no hub, no GPU
	$(BIN)/python cli.py demo

rounds: $(VENV)/.installed  ## set-up, supervised training on shipped data, then a round on its own replies to unanswered questions
	$(BIN)/python cli.py rounds --config configs/demo_rounds.yaml

test: $(VENV)/.installed-test  ## set-up and all tests, a file at a time on each core
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

slow: $(VENV)/.installed-test  ## checks on a real model, where its files can be had, and of whole commands in several processes
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/.installed-test  ## runs killed a hundred times and more, each ending as if it had never been killed
	DPO_FAULTS=long $(BIN)/python -m pytest -s tests/faults

lint: $(VENV)/.installed-test  ## style, obvious mistakes, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the documentation as a site, in site/; a warning is an error
	$(BIN)/python -m zensical build --clean --strict

clean:  ## remove the environment
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of packages: a second call reuses what is there, a changed pyproject.toml installs anew.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@ $(VENV)/.installed
