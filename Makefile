# Everything a fresh clone needs: each target sets up .venv with the versions of constraints.txt first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export DS_BUILD_OPS := 0
export GOMP_SPINCOUNT := 0
quickstart test check prove: export CUDA_VISIBLE_DEVICES :=# they are for any machine; benchmarks.gpu_suite is for GPUs
quickstart test check prove: export DS_ACCELERATOR := cpu

.PHONY: quickstart test check prove real lint install clean

install: $(INSTALLED)

# Where exported folders are tested in it. transformers would import scikit-learn into every process that finds it, a second each.
SENTENCES := sentence-transformers scikit-learn scipy joblib narwhals threadpoolctl cloudpickle

# torch is installed by itself first: the pinned version is the CPU wheel where that is the default.
$(INSTALLED): setup.py constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,quickstart]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/sentence-transformers $(SENTENCES)
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/mtllm babel build runs/quickstart/land
	@$(BIN)/mtllm run configs/quickstart.toml

# Two workers, each with one thread; at the end the 20 slowest tests and what they all took.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	@TIMEFORMAT='%R seconds, CPU-seconds: %U + %S'; time $(PYTEST) --durations 20

# Before a commit: lint, layers, types and the fast tests, in a minute and a half.
check: lint
	@$(BIN)/mypy & types=$$!; $(PYTEST) -m "not slow" && wait $$types

prove: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile long tests/model/test_families.py
	@$(BIN)/python -m benchmarks.babel

# Real models on real languages: DATA=DIR is a clone of SIB-200, TEXT=FILE English text where wikitext-2 does not lie beside it.
real: $(INSTALLED)
	@test -n "$(DATA)" || { echo "make real needs DATA=DIR, a clone of SIB-200: git clone https://github.com/dadelani/sib-200"; exit 1; }
	@$(BIN)/python -m benchmarks.real "$(DATA)" $(if $(TEXT),--text $(TEXT)) $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
