# Set-up, tests and quickstart. Every target does its own set-up, says what it does and can be repeated.
#
#   make env         create .venv with pinned versions and install sam2fast into it, editable
#   make test        the tests, in two processes (ARGS="-m 'not slow'" or ARGS=tests/kernels for a part, ARGS="-m exhaustive"
#                    for the grids that take an hour and more)
#   make quickstart  synthetic data, three training stages, validation and export on a CPU
#   make bench       the mask loss beside official PyTorch code (ARGS="click_sampling --threads 2": see benchmarks/)
#   make clean       remove .venv and what builds leave behind
#
# PYTHON chooses the interpreter (3.11 or newer) and VENV the folder: make env PYTHON=python3.12 VENV=/scratch/venv.
# Where nvidia-smi is found, torch is the CUDA build of the same version. On a machine whose torch must stay as it is,
# or that has no package index, skip make: pip install --no-deps --no-build-isolation -e . installs sam2fast alone.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),requirements/torch-cuda.txt,requirements/torch-cpu.txt)
REQUIREMENTS := $(TORCH) $(filter-out requirements/torch-%,$(wildcard requirements/*.txt))
NATIVE := CMakeLists.txt $(wildcard kernels/csrc/*)
# --no-compile: bytecode is made at the first import, of what is imported, which halves the installation.
PIP_INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input install -qq --no-compile
# A virtual environment has absolute paths inside: one that was copied along with the checkout must be made anew.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)

.PHONY: env test quickstart bench clean

env: $(VENV)/.package-$(PLACE)

test: env
	$(VENV)/bin/pytest -q --durations=10 --numprocesses=2 --dist=loadfile --no-loadscope-reorder --benchmark-disable $(ARGS)

quickstart: env
	$(VENV)/bin/sam2fast quickstart

bench: env
	$(VENV)/bin/python benchmarks/run.py $(or $(ARGS),mask_loss)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_native.so .pytest_cache .ruff_cache

$(VENV)/.created-$(PLACE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: sam2fast needs Python 3.11 or newer;" \
	       "'$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Choose another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "== virtual environment $(VENV) from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.requirements-$(PLACE): $(VENV)/.created-$(PLACE) $(REQUIREMENTS)
	@echo "== torch ($(TORCH)), about 200 MB for a CPU, several GB for CUDA"
	@$(PIP_INSTALL) -r requirements/build.txt -r $(TORCH)
	@echo "== pinned requirements (requirements/)"
	@$(PIP_INSTALL) -c requirements/constraints.txt -r requirements/runtime.txt -r requirements/test.txt
	@echo "== official SAM 2, for tests"
	@SAM2_BUILD_CUDA=0 $(PIP_INSTALL) --no-deps --no-build-isolation -r requirements/official.txt
	@touch $@

$(VENV)/.package-$(PLACE): $(VENV)/.requirements-$(PLACE) pyproject.toml setup.py $(NATIVE)
	@echo "== sam2fast and sam2fast_kernels, editable"
	@rm -f kernels/_native.so
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -c "import torch, sam2fast_kernels.library as kernels; \
	  compiled = 'yes' if kernels.load_native() else 'no (optional; pip install -v --no-build-isolation -e . says why)'; \
	  print(f'== ready: torch {torch.__version__}, compiled operators: {compiled}')"
	@touch $@
