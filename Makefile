# Each target sets up what it needs in .venv first.  PYTHON picks the interpreter (3.10 - 3.13).
# BIN=/where/bin uses an environment that is there already, as it is.
PYTHON ?= python3
BIN := .venv/bin
OURS := $(filter .venv/bin,$(BIN))

.PHONY: demo test suite compiled test-all lint bench aot aot-oldest clean
suite test-all: export PYTHONDONTWRITEBYTECODE =  # each of their processes would compile all modules
.DELETE_ON_ERROR:

demo: $(OURS:bin=train) ## pretrain on real images, evaluate, write runs/simclr-digits/report.html
	$(BIN)/fastssl pretrain simclr-digits overwrite=true

test: $(OURS:bin=dev)  ## everything CI runs; lint, types and compilation beside the tests
	$(MAKE) --no-print-directory --jobs=2 suite compiled

suite:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --benchmark-disable --numprocesses 2 --dist worksteal

compiled: lint         # what is launched, each on a chip in turn
	$(BIN)/python -m fastssl.bench.aot --used > aot.log 2>&1 || (cat aot.log; false)
	@tail -n 1 aot.log

test-all: lint         ## every case of every product of parameters, and all of `make aot`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --full --benchmark-disable --numprocesses 2 --dist worksteal
	$(MAKE) aot

lint: $(OURS:bin=dev)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/shellcheck docker/install.sh

bench: $(OURS:bin=dev)  ## losses, kernels and training steps beside their rivals
	$(BIN)/python -m fastssl.bench

aot: $(OURS:bin=dev)    ## every Triton kernel and configuration, compiled and examined without a GPU
	$(BIN)/python -m fastssl.bench.aot
	$(BIN)/python -m fastssl.bench.compiler.launches --machine-code
	$(MAKE) aot-oldest

aot-oldest: .venv/triton-3.6/triton  ## what is launched, under the oldest Triton that we take
	PYTHONPATH=.venv/triton-3.6 $(BIN)/python -m fastssl.bench.compiler.launches --machine-code

.venv/triton-3.6/triton: $(OURS:bin=dev)
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-3.6 triton==3.6.0
	@touch $@

clean:
	rm -rf .venv build dist .gpu *.egg-info  # not runs/: what was trained is yours

.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77'
	@touch $@

.venv/train: .venv/pip setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

.venv/dev: .venv/train
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Below: for a machine that has torch, triton and a GPU, and need not have a network.  Each of the two
# commands ends within its minutes whatever hangs (GPU_ARGS='--minutes 30' for more, '--only check-*'
# for one step of it) and writes to $$OUT, or else to bench/results.  What they compile is compiled
# here before, where there is time: `make gpu-pack`, and carry .gpu/ along.  Rivals, and what else
# training needs, come as wheels: `make gpu-wheels` where there is a network.
GPU_PYTHON ?= python3
GPU_VERSION ?= 3.12
GPU_TRITON ?= 3.6.0
GPU_WHEELS ?= .whl
GPU_ARGS ?=
GPU := $(GPU_PYTHON) -m fastssl.bench.gpu
PACKER := .venv/triton-$(GPU_TRITON)
PLATFORMS := $(foreach n,2_17 2_28,--platform manylinux_$(n)_x86_64) --platform manylinux2014_x86_64
DOWNLOAD := $(PYTHON) -m pip download --quiet --only-binary=:all: --python-version $(GPU_VERSION) \
	$(PLATFORMS) --dest $(GPU_WHEELS)

CARRIED := /tmp/fastssl-triton
BEGAN := $(shell date +%s)
gpu gpu-first gpu-second: export TRITON_CACHE_DIR = $(CARRIED)

.PHONY: gpu gpu-first gpu-second gpu-install gpu-pack gpu-wheels

gpu: gpu-install       ## both commands, one after the other
	$(GPU) all --began $(BEGAN) $(GPU_ARGS)

gpu-first: gpu-install ## 8 minutes: is it right, times beside eager, tuning, times again
	$(GPU) first --began $(BEGAN) $(GPU_ARGS)

gpu-second: gpu-install ## 4.5 minutes: launches, 2^31 elements, memcheck, training steps, a profile
	$(GPU) second --began $(BEGAN) $(GPU_ARGS)

gpu-install:           ## this tree, and the wheels, into GPU_PYTHON's environment; the packed cache
	$(if $(wildcard $(GPU_WHEELS)/*.whl),$(GPU_PYTHON) -m pip install --quiet --no-deps --no-index $(GPU_WHEELS)/*.whl)
	@cd / && $(GPU_PYTHON) -c 'import sys, fastssl.bench as b; sys.exit(b.__path__[0] != "$(CURDIR)/bench")' \
		2> /dev/null || (cd $(CURDIR) && timeout 90 \
		$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .)
	$(if $(wildcard .gpu/triton.tar.gz),@test $(CARRIED)/unpacked -nt .gpu/triton.tar.gz || \
		(timeout 60 tar -xzf .gpu/triton.tar.gz -C / && touch $(CARRIED)/unpacked) || true)

gpu-pack: $(PACKER)/triton  ## .gpu/triton.tar.gz, for a GPU machine with Triton GPU_TRITON: gpu-install unpacks it
	rm -rf $(CARRIED) .gpu/triton.tar.gz
	mkdir -p .gpu
	$(MAKE) --no-print-directory --jobs=2 gpu-pack-0 gpu-pack-1
	tar -czf .gpu/triton.tar.gz -C / $(CARRIED:/%=%)
	@test $$(stat -c %s .gpu/triton.tar.gz) -lt 60000000 || (echo "over 60 MB: pack less"; false)

gpu-pack-%:
	FASTSSL_GPU_RECORDING=1 TRITON_STORE_BINARY_ONLY=1 TRITON_CACHE_DIR=$(CARRIED) \
		PYTHONPATH=$(PACKER) $(BIN)/python -m tests.gpu.pack --part $* 2

.venv/triton-%/triton: $(OURS:bin=dev)
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-$* triton==$*
	@touch $@

gpu-wheels:            ## 8 MB for a GPU machine with Python GPU_VERSION on x86-64
	rm -rf $(GPU_WHEELS)
	$(DOWNLOAD) pydantic
	$(DOWNLOAD) --no-deps setuptools lightly open_clip_torch ftfy wcwidth pytorch-metric-learning \
		siglip-kernel cut-cross-entropy hjson
	DS_BUILD_OPS=0 $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(GPU_WHEELS) deepspeed
