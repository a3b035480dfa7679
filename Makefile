# `make` lists the targets. Everything runs inside .venv, which `make setup` creates and keeps fresh.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PROFILE ?= mini
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE := 1
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

.PHONY: help setup reproduce confirm test lint test-slow test-gpu test-fault bench clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: .venv/.stamp ## Create .venv with the tested versions (uv where present, otherwise pip).

.venv/.stamp: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

reproduce: setup ## Run the pipeline of PROFILE (default mini) and say where the report is.
	@python -m rlheals.profile $(PROFILE) --keep
	dvc repro
	@echo "report: reports/$(PROFILE)/index.html"

confirm: setup ## Run the three-seed study at low priority; stop it at any time and call it again to go on.
	@python -m rlheals.profile mini-confirm --keep
	nice -n 19 dvc repro
	@echo "report: reports/mini-confirm/index.html"

test: setup lint ## Lint, type check and run the tests that take seconds.
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

lint: setup ## Lint, format check and strict type check.
	ruff check .
	ruff format --check .
	mypy

test-slow: setup ## Tests that take minutes.
	python -m pytest -m slow

test-gpu: setup ## Tests that need a CUDA device.
	python -m pytest -m gpu

test-fault: setup ## Tests that kill processes, fill disks and corrupt files.
	python -m pytest -m fault

bench: setup ## Measure and print the project's own timings.
	@for script in bench/bench_*.py; do echo "== $$script"; python -m "bench.$$(basename "$$script" .py)" || exit 1; done

clean: ## Remove tool caches and half-finished state, never results or copies of params.yaml.
	if [ -d scratch ]; then find scratch -mindepth 1 -maxdepth 1 ! -name 'params.before-*.yaml' -exec rm -rf {} +; fi
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
