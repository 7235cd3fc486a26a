.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO := runs/tiny

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)  ## make .venv with everything that the other targets need

demo: $(STAMP)  ## train the tiny family, cut its members out, and show what they can do
	$(BIN)/python train.py
	rm -rf $(DEMO)/members
	$(BIN)/python extract.py checkpoint=$(DEMO)/elastic budget=medium output=$(DEMO)/members/medium
	$(BIN)/python extract.py checkpoint=$(DEMO)/elastic budget=small output=$(DEMO)/members/small
	$(BIN)/python -m elastic.evaluate run_dir=$(DEMO) members=$(DEMO)/members

test: lint types  ## lint, types and the whole suite
	$(BIN)/python -m pytest

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

format: $(STAMP)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets above have made, .venv and runs included
	rm -rf $(VENV) runs out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help install demo test lint types format clean
