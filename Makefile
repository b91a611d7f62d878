# make demo    a whole chain on this machine, from nothing; BASE=smollm2: on a real pretrained model
# make test    all tests: make unit, the fast ones; then make heavy
# WHEEL=1      install a wheel built from this checkout instead of the checkout itself, as CI does: make test WHEEL=1
# PIP_FLAGS    e.g. "--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA from PyTorch's index
# make gpu     what only a GPU can show, in 8 minutes (GPU_FLAGS: more options of tests/gpu/run.py)

PYTHON ?= python3
VENV ?= .venv
WHEEL ?=
PIP_FLAGS ?=
GPU_FLAGS ?=
BASE ?=
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready$(if $(WHEEL),-wheel)

# unit tests run in a folder that holds nothing else: they import what is installed, not what lies beside them
ALONE := build/alone
PYTEST := cd $(ALONE) && $(BIN)/python -m pytest --rootdir .
export CURLORA_WHEEL := $(WHEEL)

.PHONY: setup wheel demo test unit heavy gpu lint format ui clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PIP_FLAGS) -r requirements.lock
	$(if $(WHEEL),$(build_wheel))
	$(PIP) install --quiet --no-deps --no-build-isolation $(if $(WHEEL),--force-reinstall dist/curlora-*.whl,-e .)
	rm -f $(VENV)/.ready*
	touch $(READY)

# from nothing: setuptools would pack what an earlier build left behind
define build_wheel
rm -rf build/lib build/bdist.* dist
$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
endef

wheel: $(READY)
	$(build_wheel)

demo: $(READY)
	$(BIN)/curlora demo $(if $(BASE),--base $(BASE))

test: unit heavy

unit: export OMP_NUM_THREADS := 1
unit: $(READY) $(ALONE)
	$(PYTEST) tests/unit -n auto --dist loadfile

# on the checkout, from its root: they start drivers, jobs and nodes of their own, which run its code
heavy: $(READY)
	$(BIN)/python -m pytest tests --ignore=tests/unit --durations=20

$(ALONE):
	mkdir -p $(ALONE)
	ln -sfn ../../tests $(ALONE)/tests

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
