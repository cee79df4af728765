# In a fresh clone `make demo` or `make test` is all there is to type: each target that needs the environment makes it first.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.installed
# two workers, for two cores, with a thread each; a file stays with one, which has its fixtures
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
comma      := ,

unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-fast check lint sync notebooks pytest test-kill test-gpu bench docs docs-serve export clean-nbs

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12
	@echo; echo "VENV=dir puts the environment elsewhere than in .venv; PYTHON=python3.x makes it with another Python."

demo: $(STAMP) ## pretrain on the embedded images, then print a table and write pictures
	@$(PY) examples/demo.py

test: lint notebooks pytest ## everything CI runs: lint, notebooks, pytest (which begins with what `make sync` runs)

check: test ## the same as test

test-fast: $(STAMP) ## the tests without a browser, other processes and notebooks: at most three minutes, for in between
	$(PYTEST) -m 'not kill and not process and not browser and not notebook'

lint: $(STAMP) ## ruff, for errors only
	$(PY) -m ruff check .

sync: $(STAMP) ## are notebooks and modules in step, and is the tree tidy?
	$(PY) -m pytest tests/test_sync.py

notebooks: $(STAMP) ## run every notebook; none may fail or leave a file behind
	@before=$$(find nbs -type f | sort); \
	export TRITON_INTERPRET=$(if $(wildcard /dev/nvidiactl),0,1); \
	OMP_NUM_THREADS=1 $(PY) $(BIN)/nbdev-test --n-workers 2 --timing; \
	diff <(echo "$$before") <(find nbs -type f | sort) || { echo "make: the notebooks left these files behind (>)" >&2; exit 1; }

pytest: $(STAMP) ## the tests under tests/
	$(PYTEST)

test-kill: $(STAMP) ## kill training processes at 45 random moments and let them go on: some ten minutes, not part of test
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_checkpoint.py tests/test_streams.py -m kill

# pytest ends with 5 where all is skipped
test-gpu: $(STAMP) ## views, methods, files and processes on a CUDA card against the CPU; skipped where there is none
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(if $(wildcard /dev/nvidia0),4,0) tests/test_gpu.py || [ $$? = 5 ]

# The libraries of comparison are an extra. The parts are the files of benchmarks/ but measure.py, and gpu.py, which asks for a card.
BENCH := views step methods monitor loader loss clusters checkpointing quality labels robust whole_images streams uncurated pays selection search explore recipes

bench: $(BENCH:%=bench-%) ## measure everything against peers and limits, on an idle machine: about seven hours; one part alone: make bench-views

bench-%: $(STAMP) # writes benchmarks/results/*.md and *.json
	@$(PY) -c 'import lightly' 2>/dev/null || $(PY) -m pip install -e '.[bench]' -c constraints.txt
	@$(PY) -W ignore benchmarks/$*.py

bench-gpu: $(STAMP) ## measure views, steps, losses and k-NN on a CUDA card, some minutes; without one it is skipped
	@$(PY) -W ignore benchmarks/gpu.py

docs: $(STAMP) ## build the web site from the notebooks, in _docs
	$(PY) -W ignore docs/build.py

docs-serve: docs ## show the web site on http://127.0.0.1:8000 (PORT=8001: another port)
	$(PY) -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

export: $(STAMP) ## write the modules, and README.md, from the notebooks
	$(PY) $(BIN)/nbdev-export
	$(PY) -W ignore docs/build.py --readme

clean-nbs: $(STAMP) ## drop run counts and other metadata from the notebooks, keep their outputs
	$(PY) $(BIN)/nbdev-clean

# The stamp holds the path of the tree that the environment was installed for: one that was moved,
# or that belongs to another clone, would import the wrong code, and is installed again.
INSTALLED_FOR := $(shell cat "$(STAMP)" 2>/dev/null)
ifneq "$(INSTALLED_FOR)" "$(CURDIR)"
.PHONY: $(STAMP)
endif
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  command -v "$(PYTHON)" >/dev/null || { echo "make: there is no $(PYTHON); name your Python, $(MIN_PYTHON) or newer: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < ($(subst .,$(comma),$(MIN_PYTHON))))' \
	    || { echo "make: Python $(MIN_PYTHON) or newer is needed, this is $$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	    || { echo "make: this Python cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  "$(PYTHON)" -m venv "$(VENV)"; }
	@echo '*' > "$(VENV)/.gitignore"
	@echo "Installing self_supervised and what it needs into $(VENV): about 6 GB the first time, a few minutes"
	@$(PY) -m pip install -e '.[dev]' -c constraints.txt
	@echo "$(CURDIR)" > "$(STAMP)"
