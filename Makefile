# make quickstart   sets up .venv and runs the first search (no network needed after installation)
# make test         sets up the test environment and runs all tests
# make test-compile compiles the kernels for TPUs and NVIDIA GPUs that are not here: hundreds of programs, an hour or two
# make lint         style and types, those of the documentation's Python as well
# make docs         builds the site of the documentation in site/ (open site/index.html)
# make test-installed builds the wheel and runs it where nothing of this folder is in reach, with the newest and the
#                   lowest versions that it admits
#
# PYTHON picks the interpreter, VENV the environment's folder.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# torch is an oracle of the tests, never needed to run. TORCH= leaves it out, and with it the tests that need it.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Test files run side by side in this many processes.
WORKERS ?= 2
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-compile test-installed docs lint format clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/jaxtune search configs/quickstart.yaml

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-compile: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m compile tests/compile $(PYTEST_ARGS)

test-installed: $(VENV)/bin/python
	tests/installation/run.sh $(VENV)/bin/python

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python tests/documentation_types.py

format: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install --quiet --editable '.[report]'
	touch $@

# torch goes first and alone: named together with other packages, pip may choose another build of it.
$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml
ifneq ($(TORCH),)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable '.[test,peers]'
else
	$(PIP) install --quiet --editable '.[test]'
endif
	touch $(VENV)/.installed $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(PIP) install --quiet --editable '.[lint]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
