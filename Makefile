# SPDX-License-Identifier: Apache-2.0
# Everything a person does here. On a fresh machine: Python 3.11 and make; no GPU, nothing else running.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GRAPH ?= graphs.cova:Frontend
CONFIG ?= configs/tiny-cova.yaml
ARGS ?=
# Not in `make test`: half a minute to many minutes each.
LONG := $(wildcard tests/acceptance/test_*.py) tests/hardening/test_deadline.py tests/hardening/test_faults.py
SOURCES := dynamo_epd dynamo components graphs models benchmarks deploy tools tests build_hook.py

.PHONY: serve setup check test acceptance chaos soak bench fire scale timeline models t5-recipe vae-recipe llava-recipe image-recipe clean

serve: setup
	@exec $(BIN)/dynamo serve $(GRAPH) -f $(CONFIG) $(ARGS)

setup: $(READY)

$(READY): requirements-cpu.txt requirements-dev.txt pyproject.toml build_hook.py dynamo_epd.pth tools/install.py
	@$(PYTHON) tools/install.py $(VENV)
	@touch $(READY)

check: setup
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy $(SOURCES)

# `-rs`: what is skipped says why, and is not taken for tested.
test: setup
	@$(BIN)/pytest -q -rs --durations=20 tests $(addprefix --ignore=,$(LONG)) $(ARGS)

# Two recipes at a time, which share the cores. What is trained already is not trained again.
models: setup
	@$(MAKE) -j2 --no-print-directory t5-recipe vae-recipe llava-recipe image-recipe
	@$(BIN)/python -m models.evaluate

t5-recipe:
	@$(BIN)/python -m models.t5

vae-recipe:
	@$(BIN)/python -m models.image vae

llava-recipe:
	@$(BIN)/python -m models.llava

image-recipe: t5-recipe vae-recipe
	@$(BIN)/python -m models.image

# Each file by itself: graphs of two of them do not fit on one machine (memory, a user's inotify instances).
acceptance: setup
	@status=0; for one in $(LONG); do \
	  echo "$$one"; $(BIN)/pytest -q -rs $$one $(ARGS) || status=1; \
	done; exit $$status

# Keeps load on two workers of every stage, kills and stops them by a seed, and checks every answer.
MINUTES ?= 30
SEED ?= 7
chaos: setup
	@$(BIN)/python -m tests.hardening.chaos --minutes $(MINUTES) --seed $(SEED)

# Keeps mixed load on the graph and shows whether any process grows: an hour tells it from noise.
soak: MINUTES = 60
soak: setup
	@$(BIN)/python -m tests.hardening.soak --minutes $(MINUTES) --seed $(SEED)

# This project beside what it replaces, in one run: a table, plots and build/bench/report/report.json.
ROW ?=
bench: setup
	@$(BIN)/python -m benchmarks $(addprefix --row ,$(ROW)) $(ARGS)

# Figures of their own beside the report's; `ARGS=--record` keeps each, as it keeps a report.
fire: setup
	@$(BIN)/python -m benchmarks.fire $(ARGS)

scale: setup
	@$(BIN)/python -m benchmarks.scale $(ARGS)

timeline: setup
	@$(BIN)/python -m benchmarks.timeline $(ARGS)

clean:
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
