# make demo    a whole chain on this machine, from nothing
# make test    all tests (heavy ones included); make unit: the fast ones
# PIP_FLAGS    e.g. "--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA from PyTorch's index
# make gpu     what only a GPU can show, in 8 minutes (GPU_FLAGS: more options of tests/gpu/run.py)

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
GPU_FLAGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test unit gpu lint format ui clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY)
	$(BIN)/curlora demo

test: unit
	$(BIN)/python -m pytest tests --ignore=tests/unit --durations=30

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n auto --dist loadfile

gpu: $(READY)
	$(BIN)/python tests/gpu/run.py --minutes 8 $(GPU_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(READY)
	$(BIN)/curlora ui

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
