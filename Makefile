# make demo: from nothing to a trained model on this machine.   make test: the suite.
# VENV=/path uses an environment that already has the package; otherwise .venv is created and filled once.
VENV ?= .venv
PYTHON ?= python3
# an absolute path, so that the launchers find the same interpreter from anywhere
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
RANKS ?= 2

.PHONY: install demo test test-all lint parity matrix clean

install: $(VENV)/.nepa_scale

# an environment given by VENV that has the package is taken as it is
$(VENV)/.nepa_scale: pyproject.toml
	@if [ "$(VENV)" != ".venv" ] && $(BIN)/python -c "import nepa_scale, pytest, skimage" 2>/dev/null; then \
		echo "using $(VENV)"; \
	else \
		test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
		echo "installing into $(VENV) (once; about two minutes and 6 GB)"; \
		$(BIN)/python -m pip install --quiet --editable ".[dev]"; \
	fi
	@touch $@

data/demo/train/dataset.json: | install
	$(BIN)/python tools/make_demo_data.py

# 2 ranks on a CPU, one for each GPU where there are some (the launcher then counts them itself)
demo: install data/demo/train/dataset.json
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		deepspeed nepa_scale/train.py --ds_config ds_configs/zero3.json; \
	else \
		DS_ACCELERATOR=cpu LOCAL_SIZE=$(RANKS) OMP_NUM_THREADS=1 \
		deepspeed nepa_scale/train.py --ds_config ds_configs/zero3.json; \
	fi

test: install lint
	$(BIN)/python -m pytest -m "not slow"

# with the tests that take minutes each
test-all: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/parity.md from measured values
parity: install
	$(BIN)/python tests/sharding/parity.py --output docs/parity.md

# the table in docs/checkpoints.md, from measured values: every strategy and world size goes on from every other
matrix: install
	$(BIN)/python tests/training/matrix.py --output docs/checkpoints.md

clean:
	rm -rf runs data/demo .pytest_cache .ruff_cache .mypy_cache
