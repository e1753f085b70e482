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
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
$(INSTALLED): setup.py constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time); what pip says goes to $(VENV)/install.log"
	@{ $(PIP) setuptools wheel torch numpy && $(PIP) --no-build-isolation -e '.[dev,quickstart]' \
		&& $(PIP) --no-deps --upgrade --target $(VENV)/sentence-transformers $(SENTENCES); \
	} >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $@

LAND := runs/quickstart/land
RUN := runs/quickstart/run
define TO_TRY

llm reads the foreign text itself, translate_test its translation into English;
stack reads it through the encoder of the translation model, and so does sum, without stage 2.
This table and more: $(RUN)/results/results.md
Its picture: $(RUN)/results/results-sib200-accuracy.png
How stage 1 went, in the browser: $(RUN)/stage1/report.html

Three things to try:

1. Ask for the topic of sentences in a language that the LLM never read:
   head -3 $(LAND)/flores200_dataset/devtest/qaa_Latn.devtest | $(BIN)/mtllm classify - --model $(RUN) --language qaa_Latn

2. See what was trained, from what, and at which cost:
   $(BIN)/mtllm show $(RUN)

3. Make a folder of it that transformers opens; the README.md in it says how:
   $(BIN)/mtllm export $(RUN) --out runs/quickstart/export

Then your own models and texts: README.md goes on with them.
endef

quickstart: export SAID = $(TO_TRY)
quickstart: $(INSTALLED)
	@$(BIN)/mtllm babel build $(LAND)
	@$(BIN)/mtllm run configs/quickstart.toml
	@echo; awk '/^[|]/ {print; table = 1; next} table {exit}' $(RUN)/results/results.md
	@echo "$$SAID"

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
