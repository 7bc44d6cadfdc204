# These commands do everything from nothing but Python 3.11+ and make:
#   make demo [BACKEND=torch|tensorflow|jax]     the main job on real handwritten digits
#   make quick                                   lint, types, the fast tests on torch: two minutes
#   make test                                    lint, types, tests on three backends, doctests
#   make test-long                               all of it, kills and fuzzing in hundreds: hours
#   make docs                                    the site of docs/, into site/
#   make bench [ROWS="train infer"]              speed and memory beside others'; some 12 minutes
PYTHON ?= python3
BACKEND ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BACKENDS := torch tensorflow jax
EXTRA_torch := torch
EXTRA_tensorflow := tensorflow-cpu
EXTRA_jax := jax
ifeq ($(filter $(BACKEND),$(BACKENDS)),)
$(error BACKEND must be one of $(BACKENDS), not "$(BACKEND)")
endif

.PHONY: demo quick test test-long lint format bench docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-$(BACKEND): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing keras_resnet with $(BACKEND) into $(VENV) (once; some minutes) ..."
	$(PIP) --editable '.[$(EXTRA_$(BACKEND)),fast]'
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing keras_resnet with all backends and the tests' needs into $(VENV) (once) ..."
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps torchvision==0.28.0 grad-cam==1.5.7 timm==1.0.31 transformers==5.24.0 \
		tokenizers==0.23.3 regex==2026.11.19
	@touch $@ $(addprefix $(VENV)/installed-,$(BACKENDS))

demo: $(VENV)/installed-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/keras-resnet demo

test: $(VENV)/installed-test
	BIN=$(BIN) sh tests/run.sh

quick: $(VENV)/installed-test
	BIN=$(BIN) sh tests/run.sh quick

test-long: $(VENV)/installed-test
	BIN=$(BIN) sh tests/run.sh long

lint: $(VENV)/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# ROWS="train infer" for some of them; results are in benchmarks/results.
bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/bench.py $(ROWS)

docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open site/index.html"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis demo site
