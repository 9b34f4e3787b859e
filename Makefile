# The only commands a newcomer needs: `make recipe`, then `make test`. Everything builds .venv first.
# Times are of 2 cores.

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
EXTRAS  := sglang,megatron,rollout,recipe,test,docs
SOURCES := routing_replay recipes tools tests examples
# Options: PYTHON=path names the Python 3.12 to build from; EXTRAS=rollout,recipe,test,docs builds
# without engines, which is enough for `make check test-fast docs`; `make recipe RECIPE_ARGS="--seed 1"`;
# `make test PYTEST_ARGS="-k table"`; `make test-frameworks FRAMEWORKS_ARGS=--latest`.
RECIPE_ARGS ?=
PYTEST_ARGS ?=
# Processes that run the engine tests; each takes up to 8 GB.
TEST_WORKERS ?= 2
FRAMEWORKS_ARGS ?=

.PHONY: help env recipe test-fast test test-matrix test-versions test-frameworks check docs gpu soak bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## build .venv: both engines, 11 GB of disk; about 1 minute with uv, 5 with pip alone

recipe: env  ## train the tiny preset: real SGLang rollouts, Megatron updates, no GPU; 4 minutes
	$(PY) -m recipes.minirl $(RECIPE_ARGS)

# One thread per process: idle threads of torch spin, and the workers share the cores. A file runs in
# one worker, with its server and its ranks.
test-fast: env  ## every test that needs no engine; about a minute
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --lane core \
	  --numprocesses 3 --dist loadfile $(PYTEST_ARGS)

# The files' order (tests/conftest.py) puts those of minutes before those of seconds.
ENGINE_TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -v --durations 25 \
  --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: env  ## every test that needs no GPU, except the long ones; 14 minutes
	$(ENGINE_TESTS) -m "not gpu and not slow" $(PYTEST_ARGS)

test-matrix: env  ## the tests of `make test` and the long ones: layouts and recomputation, resumes, further models and benchmarks
	$(ENGINE_TESTS) -m "not gpu" $(PYTEST_ARGS)

test-versions: env  ## the replay suite and the capture suite on older engines; a quarter of an hour
	$(PY) .ci/test_versions megatron-core
	$(PY) .ci/test_versions sglang

test-frameworks: env  ## the adapters in the frameworks' own code (verl, SkyRL, Megatron-Bridge); an environment of 6 GB; 3 minutes
	$(PY) .ci/test_frameworks $(FRAMEWORKS_ARGS) -- $(PYTEST_ARGS)

check: env  ## lint, format and types, without changing a file
	$(VENV)/bin/ruff check $(wildcard $(SOURCES))
	$(VENV)/bin/ruff format --check $(wildcard $(SOURCES))
	$(PY) -m mypy

# Not --quiet: it hides warnings from the strict mode too. The variable silences an announcement of
# MkDocs 2; constraints.txt holds MkDocs at 1.
docs: env  ## the documentation as a site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

gpu: env  ## what one GPU can prove, in gpu.json; `python -m tools.gpu --help` says what (not run on a GPU yet)
	$(PY) -m tools.gpu $(GPU_ARGS)

soak: env  ## load on a real server, every row compared with a reference, 10 minutes (SOAK_ARGS="--seconds 3600"); a run disturbed at 50 points (CHAOS_ARGS="--points 8")
	$(PY) -m tools.soak $(SOAK_ARGS)
	$(PY) -m tools.chaos $(CHAOS_ARGS)

bench: env  ## the benchmarks of tools/bench/, one after another
	@set -e; for file in $(filter-out %/__init__.py %/paired.py %/plan_step_inputs.py %/plan_step_figures.py,$(wildcard tools/bench/*.py)); do \
	  echo "== $$file"; $(PY) -m $$(echo "$${file%.py}" | tr / .); done

clean:  ## remove the environments and all caches; the runs in runs/ stay
	rm -rf $(VENV) .venv-versions .venv-frameworks .venv-frameworks-latest build dist site .pytest_cache .ruff_cache .mypy_cache routing_replay.egg-info
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

# Rebuilt when the metadata or the pins change. The stamp is written last, so that an interrupted
# installation is taken up again by the next `make`.
$(STAMP): pyproject.toml constraints.txt .ci/find_python
	@if [ ! -x $(PY) ]; then \
	  python=$$(.ci/find_python) || exit 1; \
	  echo "Creating $(VENV) with $$python"; \
	  "$$python" -m venv $(VENV); \
	fi
	@echo "Installing into $(VENV): about 1 minute with uv, 5 minutes if only pip is at hand"
	@$(PY) -m pip install --quiet uv || echo "uv is not at hand: pip does the work"
	@if [ -x $(VENV)/bin/uv ] && $(VENV)/bin/uv pip install --quiet --compile-bytecode \
	    --python $(PY) --constraint constraints.txt --editable ".[$(EXTRAS)]"; then :; else \
	  echo "Installing with pip"; \
	  $(PY) -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]"; \
	fi
	@touch $@
	@echo "$(VENV) is ready"
