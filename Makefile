# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Installed before the package, so that pip need not choose a build of torch.
TORCH ?= torch==2.13.0
VENV ?= .venv
# Rooms that transformers and peft do not reach, and what is measured: `APART=` tests them there too.
APART ?= $(addprefix --ignore=tests/,bench cli data decisions evaluation metrics report serving session site test_benchmarks.py test_gpu.py)
OLDEST ?= transformers==5.16.0 peft==0.18.0
# What `make dist` runs of the sdist's tests, twice: such as DIST_TESTS=tests/metrics, for less.
DIST_TESTS ?= tests README.md
DIST_OPTIONS ?= -n auto
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL = help
.PHONY: help demo test test-oldest test-slow test-real test-browser test-stacks test-studies docs lint format dist clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	$(BIN)/python -m pip install -q -e ".[gguf]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --group dev
	touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --upgrade "pip>=25.1"
	.venv-oldest/bin/python -m pip install -q "$(TORCH)" numpy
	.venv-oldest/bin/python -m pip install -q -e ".[gguf]" $(OLDEST) --group test
	touch $@

.venv-stacks/installed: pyproject.toml
	$(PYTHON) -m venv .venv-stacks
	.venv-stacks/bin/python -m pip install -q --upgrade "pip>=25.1"
	.venv-stacks/bin/python -m pip install -q "$(TORCH)" numpy
	.venv-stacks/bin/python -m pip install -q -e ".[gguf]" --group stacks
	DS_BUILD_OPS=0 .venv-stacks/bin/python -m pip install -q --no-build-isolation "deepspeed>=0.19" # its build needs torch
	touch $@

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --upgrade "pip>=25.1"
	.venv-docs/bin/python -m pip install -q "$(TORCH)" numpy
	.venv-docs/bin/python -m pip install -q -e ".[gguf]" --group docs
	touch $@

demo: $(VENV)/installed  ## environment, install, fine-tune MLE and BLoB on the embedded questions, report
	$(BIN)/bayestune demo --output runs/demo --overwrite

test: lint  ## environment, install, lint, types, tests, doctests, README code
	$(BIN)/python -m pytest -n auto --dist worksteal # neighbours share their fits

test-oldest: .venv-oldest/installed  ## the tests that touch them, on the oldest supported transformers and peft
	.venv-oldest/bin/python -m pytest -n auto $(APART)

test-slow: $(VENV)/installed-dev  ## tests that take more than a few seconds each
	$(BIN)/python -m pytest -n auto -m slow

test-real: $(VENV)/installed-dev  ## real pretrained models; fetches SmolLM2-135M (98 MB)
	$(BIN)/python -m pytest -m real

test-browser: $(VENV)/installed-dev  ## pages in headless Chromium, axe-core's findings; needs Chromium and npm
	$(BIN)/python -m pip install -q --group browser
	npm install --silent --no-save --prefix $(VENV)/axe axe-core@4
	$(BIN)/python -m pytest -m browser

test-stacks: .venv-stacks/installed  ## other packages: TRL, launchers, DeepSpeed, Ray and more, in an environment of their own
	.venv-stacks/bin/python -m pytest -m stacks tests/stacks

test-studies: $(VENV)/installed-dev  ## the notebook's own tests
	$(BIN)/python -m pytest -n auto studies

docs: .venv-docs/installed  ## the site, in build/site: pages, links, code and commands checked, tutorials run
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	.venv-docs/bin/python -m pytest tests/site

lint: $(VENV)/installed-dev  ## ruff, format and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed-dev  ## ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/installed  ## sdist and wheel in dist/, each installed afresh and tested
	$(BIN)/python -m pip install -q --group release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" DIST_TESTS="$(DIST_TESTS)" DIST_OPTIONS="$(DIST_OPTIONS)" .ci/try_dist

clean:  ## remove the environments
	rm -rf .venv .venv-oldest .venv-stacks .venv-docs
