# Each target sets up what it needs in .venv first.  PYTHON picks the interpreter (3.10 - 3.13).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: .venv/train      ## pretrain on real images, evaluate, write runs/simclr-digits/report.html
	$(BIN)/fastssl pretrain simclr-digits overwrite=true

test: lint             ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/dev       ## losses against their reference and lightly
	$(BIN)/python -m fastssl.bench

clean:
	rm -rf .venv build dist *.egg-info  # not runs/: what was trained is yours

.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	@touch $@

.venv/train: .venv/pip setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

.venv/dev: .venv/train
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
