# Everything a fresh clone needs: each target sets up .venv with the versions of constraints.txt first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export DS_BUILD_OPS := 0
export GOMP_SPINCOUNT := 0
quickstart test prove: export CUDA_VISIBLE_DEVICES :=# they are for any machine; benchmarks.gpu_suite is for GPUs
quickstart test prove: export DS_ACCELERATOR := cpu

.PHONY: quickstart test prove lint install clean

install: $(INSTALLED)

# torch is installed by itself first: the pinned version is the CPU wheel where that is the default.
$(INSTALLED): setup.py constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,quickstart]'
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/mtllm babel build runs/quickstart/world
	@$(BIN)/mtllm run configs/quickstart.toml

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

prove: $(INSTALLED)
	@$(BIN)/python -m benchmarks.babel

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .hypothesis .ruff_cache
