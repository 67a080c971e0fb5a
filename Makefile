# `make demo` and `make test` do all the set-up themselves; it needs Python 3.11+ and the package registries.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := transformers==5.24.0 compressed-tensors==0.20.1
NEWEST_VENV := .venv-newest
NEWEST_READY := $(NEWEST_VENV)/.ready
LOWEST_VENV := .venv-lowest
LOWEST_READY := $(LOWEST_VENV)/.ready
OLDEST_TRITON := triton==3.6.0
OLDEST_TRITON_FOLDER := .venv-triton-oldest
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready

RECIPE ?= gptq_w4
ARGS ?=
BASE ?= main
DEMO := logs/demo
TRAINED := $(DEMO)/.trained
DEMO_SOURCES := train.py $(wildcard examples/*.py conf/*.yaml conf/model/llama_demo.yaml conf/data/stdlib.yaml \
	conf/trainer/default.yaml conf/callbacks/default.yaml)

.PHONY: help demo test test-newest chaos fuzz test-kernels test-oldest-triton test-slow test-real test-browser test-trackers test-slurm lint same-bytes house format clean
.PHONY: coverage docs notebooks dist test-lowest picture

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-18s %s\n", $$1, $$2}'

# -- set-up: once, and again when the pins or the dependencies change ---------------------------------------------------------
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV)
	@touch $@

# A second environment: the pins of the first, but for the libraries that change fastest.
$(NEWEST_READY): pyproject.toml constraints.txt scripts/setup.sh Makefile
	@mkdir -p $(NEWEST_VENV)
	grep -vE '^(transformers|compressed-tensors)==' constraints.txt > $(NEWEST_VENV)/constraints.txt
	printf '%s\n' $(NEWEST) >> $(NEWEST_VENV)/constraints.txt
	CONSTRAINTS=$(NEWEST_VENV)/constraints.txt PYTHON=$(PYTHON) scripts/setup.sh $(NEWEST_VENV)
	@touch $@

# A third one: the lowest versions that pyproject.toml promises.
$(LOWEST_READY): pyproject.toml scripts/setup.sh scripts/lowest_versions.py
	@mkdir -p $(LOWEST_VENV)
	$(PYTHON) scripts/lowest_versions.py > $(LOWEST_VENV)/constraints.txt
	CONSTRAINTS=$(LOWEST_VENV)/constraints.txt PYTHON=$(PYTHON) scripts/setup.sh $(LOWEST_VENV)
	@touch $@

# What builds the site reads the source and imports none of it, so its environment holds no torch.
DOCS_EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c '$(DOCS_EXTRA)' | xargs $(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt
	@touch $@

# -- the demo: trains once, later runs compress the model that the first one trained ------------------------------------------
demo: $(READY)  ## train a small Llama, compress it to 4 bits, measure it before and after (RECIPE=gptq_w4)
	@if $(MAKE) --question --no-print-directory $(TRAINED) 2>/dev/null; then \
		echo "The model is trained already ($(DEMO)/checkpoints/best.ckpt; 'make clean' forgets it): compressing it."; \
		set -x; $(BIN)/python train.py +compress=$(RECIPE) train=false ckpt_path=$(DEMO)/checkpoints/best.ckpt $(ARGS); \
	else $(MAKE) --no-print-directory $(TRAINED); fi

$(TRAINED): $(DEMO_SOURCES)
	@rm -rf $(DEMO)
	$(BIN)/python train.py +compress=$(RECIPE) hydra.run.dir=$(DEMO) $(ARGS)
	@test -e $(DEMO)/compressed.ckpt
	@touch $@

picture: $(TRAINED)  ## docs/images/report.png: the page of the demo's model at 3 bits, as a browser draws it
	$(BIN)/python train.py +compress=gptq_w3 train=false ckpt_path=$(DEMO)/checkpoints/best.ckpt hydra.run.dir=logs/picture
	$(BIN)/python scripts/picture.py logs/picture/report/index.html docs/images/report.png --height 1270

include benchmarks/bench.mk
include scripts/slurm/slurm.mk

# -- checks -----------------------------------------------------------------------------------------------------------------
# One thread each: the tests' models are tiny. Two processes share the files (WORKERS=0: one process, for a debugger).
TEST := OMP_NUM_THREADS=1 HYDRA_FULL_ERROR=1 $(BIN)/python -m pytest
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

# Kernels twice: compiled, with all the others; and in Triton's interpreter, which must be chosen before Triton is imported.
HERE := -m "not (slow or real or slurm or gpu or browser or trackers)"
test: $(READY)  ## the tests that need no GPU, no cluster and no download
	$(TEST) $(PARALLEL) $(HERE) $(ARGS)
	TRITON_INTERPRET=1 $(TEST) $(PARALLEL) tests/ops -k interpreted

test-newest: $(NEWEST_READY)  ## exports, KV caches and reloads with the newest transformers and compressed-tensors
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(HERE) \
		tests/export/test_reload_kv_cache.py tests/export/test_reload.py $(ARGS)

test-lowest: $(LOWEST_READY)  ## the tests with the lowest versions that pyproject.toml promises
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest $(PARALLEL) $(HERE) $(ARGS)

coverage: $(READY)  ## the tests, and the lines and branches of the package that they miss
	$(TEST) $(PARALLEL) $(HERE) --cov --cov-report=term --cov-report=xml $(ARGS)

chaos: $(READY)  ## kill calibrations and exports 50 times, on one and two processes, and compare (ARGS="--kills 10 --seed 1")
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.chaos $(ARGS)

fuzz: $(READY)  ## damaged files for every reader of the package, 30 seconds (ARGS="--seconds 600")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.driver $(ARGS)

test-kernels: $(READY)  ## the GPU kernels alone, interpreted against float64 and compiled for sm_80 to 100; needs no GPU
	TRITON_INTERPRET=1 $(TEST) tests/ops -k interpreted $(ARGS)
	$(TEST) tests/ops -k compiled $(ARGS)

# Its ptxas is another one (budgets, and writes to registers that an asynchronous product still reads), its interpreter too,
# which needs NumPy's conversion of arrays of one number to a scalar.
test-oldest-triton: $(READY)  ## all kernels interpreted and compiled by the oldest Triton that is supported; 20 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(OLDEST_TRITON_FOLDER) $(OLDEST_TRITON) 'numpy<2.4'
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON_FOLDER) $(BIN)/python -c \
		'import triton; assert "triton==" + triton.__version__ == "$(OLDEST_TRITON)", triton'
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON_FOLDER) TRITON_INTERPRET=1 $(TEST) $(PARALLEL) tests/ops -k interpreted $(ARGS)
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON_FOLDER) $(TEST) $(PARALLEL) tests/ops -k compiled $(ARGS)

test-slow: $(READY)  ## the tests that take minutes
	$(TEST) -m "slow and not (real or slurm or gpu)" --timeout=1800 $(ARGS)

test-real: $(READY)  ## the tests on real models and texts, made as benchmarks/ says
	$(TEST) -m real --timeout=3600 $(ARGS)

test-browser: $(READY)  ## the tests that look at pages in a headless Chromium
	$(TEST) -m browser $(ARGS)

# Their packages bring 30 others, which no other test needs.
test-trackers: $(READY)  ## the tests of W&B (offline) and MLflow (in files); installs the extra "trackers"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trackers]'
	$(TEST) -m trackers $(ARGS)

test-slurm: $(READY)  ## the tests that need a Slurm cluster
	$(TEST) -m slurm --timeout=1800 $(ARGS)

lint: $(READY)  ## ruff, its format, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

same-bytes: $(READY)  ## whether exports are the same as at the commit BASE=main, byte for byte (ARGS="--only gptq")
	$(BIN)/python scripts/same_bytes.py --base $(BASE) $(ARGS)

house:  ## lengths, nesting, arguments, cycles, mirrored tests of the package (ARGS="--against main" shows both)
	$(PYTHON) scripts/house.py $(ARGS)

format: $(READY)  ## let ruff mend and format; write the modifiers' names for type checkers, their arguments for editors
	$(BIN)/python -m scripts.modifier_stub
	$(BIN)/python -m scripts.recipe_schemas
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY)  ## the documentation as a site, with API pages from docstrings; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)

notebooks: $(READY)  ## run the tutorials and write their notebooks (ARGS="qat_distillation" one of them)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.notebooks $(ARGS)

dist: $(READY)  ## sdist in dist/, and the wheel that it builds
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

clean:  ## forget the demo's model, the runs and the caches (the environment stays)
	rm -rf logs build dist site coverage.xml .coverage .pytest_cache .mypy_cache .ruff_cache
