# make demo: environment, embedded model, real text, and a first run.   make test: the tests.
# Every target brings what it needs; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OLD := .venv-old
OLD_TRANSFORMERS := 5.0.0
MODELS_TESTS := derive finder copy backbone loading hard_cases retrofit notebook conformance

.PHONY: help demo test lint check bench format embedded conformance test-transformers-old faults clean

help:
	@echo "make demo    set up, then capture q and k from a real model over real text"
	@echo "make test    the tests"
	@echo "make check   format, lint, types, tests"
	@echo "make faults  kills, signals, full disks and damaged files: nothing may be lost (some minutes)"
	@echo "make bench   the measurements that performance claims rest on"
	@echo "make conformance            every decoder of the installed transformers, tapped and compared"
	@echo "make test-transformers-old  the modelling rules against transformers $(OLD_TRANSFORMERS)"
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

faults: $(INSTALLED)
	$(RUN) -m pytest -n 2 tests/faults/faults.py

bench: embedded
	$(RUN) -m benchmarks

conformance: $(INSTALLED)
	$(RUN) -m tests.conformance

# The modelling rules against an older release: what a new one may change, an old one had otherwise.
test-transformers-old: $(OLD)/.installed
	$(OLD)/bin/python -m pytest $(addprefix tests/test_,$(addsuffix .py,$(MODELS_TESTS)))

$(OLD)/.installed: pyproject.toml constraints-dev.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-dev.txt \
		-e '.[demo,dev]' transformers==$(OLD_TRANSFORMERS)
	@touch $@

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(OLD) .mypy_cache .pytest_cache .ruff_cache build dist
