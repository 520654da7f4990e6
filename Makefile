# The same commands as CONTRIBUTING.md, with an environment of their own. PYTHON and VENV can be set on the command line:
#   make demo PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A change of either file means another environment; a change of the sources does not, they are installed in place.
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-all test-fast check schemas clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are written last, so an installation that was cut short is taken up again.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[test,docs]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## the package and what it needs, in $(VENV)

demo: $(VENV)/.installed  ## train a teacher, a student alone and a distilled student on drawn images (minutes, no download)
	$(BIN)/python scripts/demo.py

docs: $(VENV)/.installed-test  ## build the documentation in site/, strictly and without a network
	$(BIN)/python -m mkdocs build --strict

test: $(VENV)/.installed-test  ## the tests, those that train included, without the longest (a quarter of an hour)
	VENV=$(VENV) scripts/test -m "not long"

test-all: $(VENV)/.installed-test  ## every test, as in .ci/run
	VENV=$(VENV) scripts/test

test-fast: $(VENV)/.installed-test  ## the tests that train nothing (two minutes)
	VENV=$(VENV) scripts/test -m "not e2e"

check: $(VENV)/.installed-test  ## style, format and types
	VENV=$(VENV) scripts/check

schemas: $(VENV)/.installed  ## write the JSON Schemas of recipes and experiment files from the models
	for name in recipe experiment; do $(BIN)/python -m yolo_kd schema $$name > yolo_kd/config/schemas/$$name.json; done

clean:  ## remove caches, builds and the demonstration's files; keeps $(VENV) and your runs
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage runs/demo *.egg-info
	find yolo_kd scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
