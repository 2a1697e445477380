# Two commands: `make train` and `make test`. Each installs what it needs, and no more, into .venv first.
#
# PYTHON chooses the interpreter. If it is given, as in `make test PYTHON=python3.13`, the environment is .venv-3.13.
SHELL := bash
.SHELLFLAGS := -e -o pipefail -c
export PYTHONUNBUFFERED := 1

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest --dist worksteal -n $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() + 1, 8))')

.PHONY: help train test test-more test-all mutants lint types examples bench bench-engines bench-lean bench-codes \
  bench-memory bench-scale bench-loops bench-guards bench-compile bench-checkpoint tpu-check gpu-check gpu multihost docs \
  parity lock clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

$(VENV)/created: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "adamite needs Python 3.11 or newer, and $(PYTHON) is $(or $(VERSION),not there): make PYTHON=python3.12"; exit 1; }
	@echo "Creating $(VENV) with Python $(VERSION)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# $(call install,FOLLOWING,WHAT): the sections of requirements.lock before FOLLOWING, with a dot for each package.
define install
	@echo "Installing $(2) into $(VENV)"
	@sed '/^# == $(1) ==/,$$d' requirements.lock > $(VENV)/requirements.txt
	@$(PIP) install --progress-bar off --require-hashes -r $(VENV)/requirements.txt \
	  | awk '/^Collecting/ {printf "."; fflush()} END {print ""}'
endef

$(VENV)/train.installed: $(VENV)/created
	$(call install,test,JAX and Flax (about a minute and 0.9 GB))
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/test.installed: $(VENV)/train.installed
	$(call install,check,the test tools (seconds))
	@touch $@

$(VENV)/check.installed: $(VENV)/test.installed
	$(call install,end,the tools for lint types and docs (half a minute and 0.3 GB))
	@touch $@

NATIVE := $(shell find native -type f -not -path '*/build/*' -not -name '*.pyc') \
  $(wildcard src/adamite/*.py src/adamite/*/*.py)
WHEEL = $(PIP) wheel --verbose --no-deps --no-build-isolation --no-index -C cmake.define.ADAMITE_HERE=ON

# It may fail, as where there is no compiler: adamite then steps with XLA. WHEELS names a folder with a wheel that is
# built already.
$(VENV)/native: $(VENV)/train.installed $(NATIVE)
ifdef WHEELS
	@$(PIP) install --quiet --force-reinstall --no-deps --no-index $(WHEELS)/adamite_native-*.whl
else
	@if ! command -v c++ > /dev/null; then echo "There is no C++ compiler (c++): XLA will take all steps"; \
	else echo "Building adamite-native, the compiled steps for this processor (one to three minutes, once)"; \
	  rm -rf $(VENV)/wheels; \
	  if PATH="$(CURDIR)/$(BIN):$$PATH" $(WHEEL) -w $(VENV)/wheels ./native 2>&1 | tee $(VENV)/native.log \
	    | awk 'match($$0, /^ *\[[0-9]+\/[0-9]+\]/) {printf "  %s\n", substr($$0, RSTART, RLENGTH); fflush()}' \
	    && $(PIP) install --quiet --force-reinstall --no-deps --no-index $(VENV)/wheels/*.whl; then :; \
	  else tail -n 20 $(VENV)/native.log; echo "It could not be built ($(VENV)/native.log): XLA will take all steps"; fi; fi
endif
	@touch $@

train: $(VENV)/native  ## train a classifier and a language model with adamite, write out/ (2 minutes)
	$(BIN)/python examples/train $(ARGS)

test: $(VENV)/native $(VENV)/test.installed  ## the tests that tell most, and the doctests (3 to 5 minutes)
	$(PYTEST) -m "not more and not slow" $(ARGS)

test-more: $(VENV)/native $(VENV)/test.installed $(VENV)/libtpu $(VENV)/gpu-compiler  ## the rest of what CI runs (10 to 15 minutes)
	$(PYTEST) -m "more and not slow" $(ARGS)

test-all: $(VENV)/native $(VENV)/test.installed $(VENV)/libtpu $(VENV)/gpu-compiler  ## every test that this machine can run (two hours)
	$(PYTEST) $(ARGS)

mutants: $(VENV)/test.installed  ## break every rule in every place, and see that the golden trajectories notice
	$(BIN)/python tests/mutants.py $(ARGS)

lint: $(VENV)/check.installed  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/check.installed  ## static types
	$(BIN)/pyright --warnings --pythonpath $(BIN)/python

docs: $(VENV)/check.installed  ## the manual as HTML, in docs/_build
	$(BIN)/sphinx-build -W -q -b html docs docs/_build

examples: $(VENV)/test.installed  ## run every example, each draws a picture into out/
	$(BIN)/python examples/all.py

multihost: $(VENV)/train.installed  ## train on two processes of four simulated devices each; again, and it goes on
	$(BIN)/python examples/multihost.py --local 2 --devices 4 $(ARGS)

bench: $(VENV)/native  ## step, eager step, trace and compile time beside optax, median of paired runs, JSON into out/
	$(BIN)/python benchmarks/adam_step.py $(ARGS)

bench-engines: $(VENV)/native  ## whole steps by each engine, storage and rounding, beside optax and torch (10 minutes)
	$(BIN)/python benchmarks/engines.py $(ARGS)

bench-lean: $(VENV)/train.installed  ## final loss, bytes and time of every way to keep moments and weights (half an hour)
	$(BIN)/python benchmarks/lean.py $(ARGS)

bench-codes: $(VENV)/train.installed  ## what 8-bit codes do to Adam's step
	$(BIN)/python benchmarks/codes.py $(ARGS)

bench-memory: $(VENV)/train.installed  ## bytes that a step keeps and needs beside, from the compiler
	$(BIN)/python benchmarks/step_memory.py $(ARGS)

bench-scale: $(VENV)/train.installed  ## a training step on 1 to 8 simulated devices: replicated, ZeRO-1, FSDP
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-loops: $(VENV)/native $(VENV)/test.installed  ## whole training steps in NNX, Linen, Equinox and plain JAX, by update and by step
	$(BIN)/python benchmarks/loops.py $(ARGS)

bench-guards: $(VENV)/train.installed  ## what guards, accumulation and telemetry cost beside the plain optimizer
	$(BIN)/python benchmarks/guards.py $(ARGS)

bench-compile: $(VENV)/train.installed  ## CPU seconds to trace and compile guards, accumulation and telemetry (15 minutes)
	$(BIN)/python benchmarks/compile_time.py $(ARGS)

bench-checkpoint: $(VENV)/train.installed  ## what the checks of a checkpoint cost beside Orbax alone
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

parity: $(VENV)/test.installed  ## install torch beside, compare with it in float64; `make bench` then times it, too
	$(PIP) install --quiet torch==2.13.0
	$(BIN)/python -m pytest tests/parity_torch.py tests/interop/parity_interop.py

# The TPU's compiler, of the version that this JAX names in its extra `tpu`: another cannot read its kernels.
$(VENV)/libtpu: $(VENV)/train.installed
	@echo "Fetching the TPU's compiler"
	@$(PIP) install --quiet --no-deps --target $@ "$$($(BIN)/python -c 'from importlib.metadata import requires; \
	  print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"

TPU := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_LIBRARY_PATH=$(CURDIR)/$(VENV)/libtpu/libtpu/libtpu.so $(BIN)/python
QUIETLY := 2>&1 | grep -v "TPU_WORKER_HOSTNAMES\|accelerator type\|InitGoogle\|Source Location\|libtpu_init"

tpu-check: $(VENV)/libtpu  ## what the TPU compiler makes of a step: bytes kept, moved and sent, time to compile; needs no TPU (20 minutes)
	$(TPU) benchmarks/scale.py --tpu --out out/tpu-scale.json $(QUIETLY)
	$(TPU) benchmarks/guards.py --tpu --out out/tpu-guards.json $(QUIETLY)
	$(TPU) benchmarks/step_memory.py --tpu --out out/tpu-check.json $(QUIETLY)
	$(TPU) benchmarks/compile_time.py --tpu --rounds 1 --out out/tpu-compile-time.json $(QUIETLY)

# XLA's compiler for NVIDIA's GPUs, of the version that this JAX names in its extra `cuda13`, without CUDA; NVRTC and
# nvdisasm of one version, because the figures depend on it.
$(VENV)/gpu-compiler: $(VENV)/train.installed
	@echo "Fetching the compilers for GPUs (200 MB)"
	@$(PIP) install --quiet --no-deps --target $@ nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvdisasm==13.5.37 \
	  $$($(BIN)/python -c 'from importlib.metadata import requires; name = "jax-cuda13-plugin[with-cuda]"; \
	  wanted = next(r.split(";")[0] for r in requires("jax") if r.startswith(name)); \
	  print(*(wanted.replace(name, "jax-cuda13-" + part) for part in ("plugin", "pjrt")))')

GPU := JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/$(VENV)/gpu-compiler $(BIN)/python

# All of it (5 minutes): make gpu-check ARGS="--out benchmarks/results/gpu-compiler.json"
gpu-check: $(VENV)/gpu-compiler  ## what compilers make of a step on an H100: bytes, launches, instructions; needs no GPU (2 minutes)
	$(GPU) benchmarks/gpu_compiler.py $(or $(ARGS),--check)

# It installs nothing: PYTHON has JAX for CUDA, and Optax. As JSON and picture into benchmarks/results.
gpu:  ## bits, races and speed of the kernels on an NVIDIA GPU, within 5 minutes; ARGS=--emulated rehearses it without one
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lock:  ## write requirements.lock anew (needs uv)
	$(PYTHON) .ci/lock.py

clean:  ## remove what the commands above made
	rm -rf .venv .venv-* native/build out docs/_build .pytest_cache .ruff_cache .hypothesis
