# Each target does all the set-up it needs on a bare clone, and skips it when it is up to date.
SHELL := /bin/bash
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX

PY := .venv/bin/python
STAMP := .venv/.ready

.PHONY: help setup demo test check bench lock clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the environment, in .venv

$(STAMP): deploy/requirements/cpu.txt pyproject.toml deploy/setup.sh
	@deploy/setup.sh
	@touch $(STAMP)

demo: $(STAMP)  ## set up and play three rounds of iterative DPO on this machine's CPU, in runs/demo
	@.venv/bin/dpo-loop demo

test: $(STAMP)  ## set up and pass the tests, two files at a time
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=12

check: $(STAMP)  ## lint, architecture, types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/lint-imports
	@.venv/bin/mypy

bench: $(STAMP)  ## the benchmarks; minutes each
	@$(PY) -m tests.benchmarks.judge_throughput
	@$(PY) -m tests.benchmarks.gate_power
	@$(PY) -m tests.benchmarks.gate_speed
	@$(PY) -m tests.benchmarks.train_vs_trl
	@$(PY) -m tests.benchmarks.demo_quality --seeds 3

lock: $(STAMP)  ## make the complete lock anew from pyproject.toml
	@deploy/setup.sh lock

clean:  ## remove the environment; runs are kept
	@rm -rf .venv
