# The commands of the project. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help environment repro record report test lint format bench preset clean

PYTHON ?= python3# any 3.11 or 3.12 with venv and pip; `make environment PYTHON=python3.12`
ARGS ?=# more arguments for dvc repro or pytest: `make repro ARGS=--force`, `make test ARGS=--slow`
SEEDS ?= 42 314 999# of a record
AGAINST ?=# what a record is claimed to be better than: `make record AGAINST=1493`
RUNS ?=# of a report: folders, revisions or experiments; without one, the working tree
VENV := .venv
BENCHMARKS := scoring training# those that need no GPU and no data
STAMP := $(VENV)/.installed
# DVC starts `python` from PATH, and must find this one.
ACTIVATE := . $(VENV)/bin/activate

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(STAMP)  ## .venv with the exact versions of requirements-dev.lock

# Made anew when a lock file changes, so that nothing of the last one stays behind.
$(STAMP): requirements.lock requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "error: $(PYTHON) is %d.%d, expected 3.11 or 3.12; name one with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $(STAMP)

repro: environment  ## run the pipeline of params.yaml; stages that are up to date are skipped
	$(ACTIVATE) && dvc repro $(ARGS)

# One experiment after the other, each in a clone of its own. An experiment of that name is made anew, since it may be of another working
# tree; stages that have run before with the same inputs come out of DVC's cache.
record: environment  ## run the seeds as experiments and merge them into records/: make record AGAINST=1493
	$(ACTIVATE) && for seed in $(SEEDS); do \
	  if dvc exp list --name-only | grep --line-regexp "seed-$$seed" > /dev/null; then dvc exp remove --quiet seed-$$seed; fi; \
	  dvc exp run --temp --name seed-$$seed --set-param seed=$$seed $(ARGS); \
	done
	$(ACTIVATE) && python -m tools.record $(SEEDS:%=seed-%) $(if $(AGAINST),--against $(AGAINST))

report: environment  ## one page about runs side by side, in .scratch/report/: make report RUNS="seed-42 seed-999"
	$(ACTIVATE) && python -m tools.report $(RUNS)

# Threads of torch that wait for each other must not spin: two processes, and what they start, have more threads than there are cores.
test: environment  ## the tests, on two processes
	$(ACTIVATE) && OMP_WAIT_POLICY=passive pytest -n 2 --dist loadgroup $(ARGS)

lint: environment  ## format, lint, types, spelling
	$(ACTIVATE) && ruff format --check . && ruff check . && mypy && codespell

format: environment  ## format the source and apply ruff's fixes
	$(ACTIVATE) && ruff check --fix . && ruff format .

bench: environment  ## the CPU benchmarks (benchmarks/README.md)
	$(ACTIVATE) && for name in $(BENCHMARKS); do python -m benchmarks.$$name; done

preset: environment  ## apply a preset to params.yaml: make preset NAME=record
	$(ACTIVATE) && python -m tools.preset $(if $(NAME),$(NAME),--help)

clean:  ## remove the environment and the caches of the tools; artifacts and the DVC cache stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
