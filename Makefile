# One command for each thing that a person or a CI machine does in this tree.

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help env demo test lint clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1 - \2/p' $(MAKEFILE_LIST)

env: $(INSTALLED) ## make .venv with everything that the other targets need

demo: env ## quantize, evaluate and verify a small real model on this machine
	$(BIN)/python -m jobs.demo

test: env ## run every test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore=tests/jobs/test_submit.py
	$(BIN)/python -m pytest tests/jobs/test_submit.py  # starts the largest cluster, which wants the cores for itself

lint: env ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove what the other targets made, .venv and the demo's model among it
	rm -rf .venv demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Remade when what it installs may have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'no Python 3.11 or later found; set PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
