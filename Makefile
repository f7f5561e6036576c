# `make demo` and `make test` need python3 (3.10 or newer) and make; everything else they install into .venv.

PYTHON ?= python3
DATASET ?=
TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := onecomp cluster actors

export RAY_USAGE_STATS_ENABLED := 0
# Ray on Linux then listens on the loopback device only.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER := 0
export RAY_ENABLE_ZERO_COPY_TORCH_TENSORS := 1
export RAY_AUTH_MODE := disabled
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-all demo bench clean

help:
	@echo "make demo      quantize a real model on two local Ray workers and measure it"
	@echo "               (DATASET=name-or-file uses that text instead of Python's own)"
	@echo "make test      lint, types, unit tests, doctests"
	@echo "make test-all  make test and the slow tests"
	@echo "make lint      ruff and pyrefly only"
	@echo "make bench     speed, memory and accuracy on SmolLM2-135M (TEXT=file measures on that text)"
	@echo "make clean     remove .venv and build"

venv: $(STAMP)

# torch first, alone: its CPU build then satisfies every later requirement. DeepSpeed is compiled from source without
# its operators; PIP_CONSTRAINT also reaches the isolated builds, so none of them can bring another torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 PIP_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,demo]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test test-all: export HF_HUB_OFFLINE := 1

test: lint
	$(BIN)/python -m pytest --doctest-modules -m "not slow" tests $(PACKAGES)

test-all: lint
	$(BIN)/python -m pytest --doctest-modules tests $(PACKAGES)

demo: $(STAMP)
	$(BIN)/python deploy/demo.py $(if $(DATASET),--dataset "$(DATASET)")

bench: $(STAMP)
	$(BIN)/python deploy/fetch_smollm2.py build/smollm2-135m
	$(BIN)/python deploy/demo_texts.py build/demo
	cat build/demo/calibration.txt build/demo/evaluation.txt > build/demo/text.txt
	$(BIN)/python benchmarks/quantize_smollm2.py build/smollm2-135m $(or $(TEXT),build/demo/text.txt)

clean:
	rm -rf $(VENV) build dist
