# Two commands: `make train` and `make test`. Each builds .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal
export PYTHONUNBUFFERED := 1

.PHONY: help train test test-all mutants lint types examples bench bench-engines bench-lean bench-codes bench-memory bench-scale bench-guards bench-checkpoint tpu-check multihost docs parity lock clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

.venv/ready: requirements.lock
	@echo "Setting up .venv from requirements.lock (once, about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adamite needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

NATIVE := $(shell find native -type f -not -path '*/build/*') $(wildcard src/adamite/*.py src/adamite/*/*.py)

# It may fail, as where there is no compiler: adamite then steps with XLA.
.venv/native: .venv/ready $(NATIVE)
	@echo "Building adamite-native, the compiled steps for this processor (a minute or two, once)"
	@if ! command -v c++ > /dev/null; then echo "There is no C++ compiler (c++): steps will be XLA's alone"; \
	elif PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --no-index -C cmake.define.ADAMITE_HERE=ON ./native > .venv/native.log 2>&1; then :; \
	else tail -n 20 .venv/native.log; echo "It could not be built (.venv/native.log): steps will be XLA's alone"; fi
	@touch $@

train: .venv/native  ## train a classifier and a language model with adamite, write out/ (2 minutes)
	$(BIN)/python examples/train $(ARGS)

# Where numbers are at stake, XLA compiles as it does for programs. All else asks only that what is compiled alike comes
# out alike, and is compiled as fast as can be, for that is most of the time.
NUMBERS := src docs README.md tests/algorithms tests/kernels/test_native.py tests/test_contract_cases.py \
  tests/test_differences.py tests/test_family.py tests/test_lean_long.py tests/test_rounding.py tests/test_step.py
FAST := XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"

test: .venv/native  ## all tests but the slow ones, and the doctests (a quarter of an hour)
	$(PYTEST) -m "not slow" $(NUMBERS) $(ARGS)
	$(FAST) $(PYTEST) -m "not slow" tests $(addprefix --ignore=,$(NUMBERS)) $(ARGS)

test-all: .venv/native out/libtpu  ## every test that this machine can run, all compiled as programs are (two hours)
	$(PYTEST) $(ARGS)

mutants: .venv/ready  ## break every rule in every place, and see that the golden trajectories notice
	$(BIN)/python tests/mutants.py $(ARGS)

lint: .venv/ready  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready  ## static types
	$(BIN)/pyright --warnings

examples: .venv/ready  ## run every example, each draws a picture into out/
	$(BIN)/python examples/all.py

bench: .venv/native  ## step, trace and compile time beside optax, median of paired runs, JSON into out/
	$(BIN)/python benchmarks/adam_step.py $(ARGS)

bench-engines: .venv/native  ## whole steps by each engine, storage and rounding, beside optax and torch (10 minutes)
	$(BIN)/python benchmarks/engines.py $(ARGS)

bench-lean: .venv/ready  ## final loss, bytes and time of every way to keep moments and weights (half an hour)
	$(BIN)/python benchmarks/lean.py $(ARGS)

bench-codes: .venv/ready  ## what 8-bit codes do to Adam's step
	$(BIN)/python benchmarks/codes.py $(ARGS)

bench-memory: .venv/ready  ## bytes that a step keeps and needs beside, from the compiler
	$(BIN)/python benchmarks/step_memory.py $(ARGS)

bench-scale: .venv/ready  ## a training step on 1 to 8 simulated devices: replicated, ZeRO-1, FSDP
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-guards: .venv/ready  ## what guards, accumulation and telemetry cost beside the plain optimizer
	$(BIN)/python benchmarks/guards.py $(ARGS)

bench-checkpoint: .venv/ready  ## what the checks of a checkpoint cost beside Orbax alone
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

TPU := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_LIBRARY_PATH=$(CURDIR)/out/libtpu/libtpu/libtpu.so $(BIN)/python
QUIETLY := 2>&1 | grep -v "TPU_WORKER_HOSTNAMES\|accelerator type\|InitGoogle\|Source Location\|libtpu_init"

tpu-check: SHELL := bash
tpu-check: .SHELLFLAGS := -o pipefail -c
tpu-check: out/libtpu  ## what the TPU compiler makes of a step: bytes kept, moved and sent; needs no TPU (10 minutes)
	$(TPU) benchmarks/scale.py --tpu --out out/tpu-scale.json $(QUIETLY)
	$(TPU) benchmarks/guards.py --tpu --out out/tpu-guards.json $(QUIETLY)
	$(TPU) benchmarks/step_memory.py --tpu --out out/tpu-check.json $(QUIETLY)

out/libtpu: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ libtpu==0.0.42.1

multihost: .venv/ready  ## train on two processes of four simulated devices each; again, and it goes on
	$(BIN)/python examples/multihost.py --local 2 --devices 4 $(ARGS)

parity: .venv/ready  ## install torch beside, compare with it in float64; `make bench` then times it, too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pytest tests/parity_torch.py tests/interop/parity_interop.py

docs: .venv/ready  ## the manual as HTML, in docs/_build
	$(BIN)/sphinx-build -W -q -b html docs docs/_build

lock:  ## write requirements.lock anew (needs uv)
	uv pip compile pyproject.toml --extra tests --extra examples --extra docs --extra build --universal \
	  --fork-strategy fewest --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" -q -o requirements.lock

clean:  ## remove what the commands above made
	rm -rf .venv native/build out docs/_build .pytest_cache .ruff_cache .hypothesis
