# SPDX-License-Identifier: Apache-2.0
# Everything a person does here. On a fresh machine: Python 3.11 and make; no GPU, nothing else running.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TINY := models/tiny/llava/untrained.json
GRAPH ?= graphs.disagg:Frontend
CONFIG ?= configs/tiny-disagg.yaml
ARGS ?=
SOURCES := dynamo_epd dynamo components graphs models tools tests build_hook.py

.PHONY: serve setup check test acceptance clean

serve: setup
	@exec $(BIN)/dynamo serve $(GRAPH) -f $(CONFIG) $(ARGS)

setup: $(READY) $(TINY)

$(READY): requirements-cpu.txt requirements-dev.txt pyproject.toml build_hook.py dynamo_epd.pth tools/install.py
	@$(PYTHON) tools/install.py $(VENV)
	@touch $(READY)

$(TINY): models/untrained.py | $(READY)
	@echo "tiny random model: models/tiny/llava"
	@rm -rf $(@D) && $(BIN)/python models/untrained.py llava $(@D) >$(VENV)/untrained.log 2>&1 || (cat $(VENV)/untrained.log; exit 1)

check: setup
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy $(SOURCES)

test: setup
	@$(BIN)/pytest -q tests --ignore=tests/acceptance $(ARGS)

acceptance: setup
	@$(BIN)/pytest -q tests/acceptance $(ARGS)

clean:
	@rm -rf $(VENV) models/tiny build dist .pytest_cache .mypy_cache .ruff_cache
