# make demo: environment, embedded model, real text, and a first run.   make test: the tests.
# Every target brings what it needs; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint check bench format embedded clean

help:
	@echo "make demo    set up, then capture q and k from a real model over real text"
	@echo "make test    the tests"
	@echo "make check   format, lint, types, tests"
	@echo "make bench   the measurements that performance claims rest on"
	@echo "make format  rewrite the sources in the house format"

$(INSTALLED): pyproject.toml constraints-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check -c constraints-dev.txt -e '.[demo,dev]'
	@touch $@

embedded: $(INSTALLED)
	@$(RUN) -m models.embedded

demo: embedded
	$(RUN) -m sniffer experiment=demo

test: embedded
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check: lint test

bench: embedded
	$(RUN) -m benchmarks

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
