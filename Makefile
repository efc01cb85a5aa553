# Every target makes what it needs: .venv with the packages of pyproject.toml, from any Python of at least 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FILE ?=
# More than the two processors that most machines of checks have: tests wait for servers a part of their time.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types lint-sql format pytest test-slow test-faults bench bench-quick bench-peers bench-check docs generate clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("elizasql needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet --editable . --group dev
	@touch $@

demo: $(VENV)/installed ## an agent remembers a conversation and answers (FILE=... for a text of your own)
	$(BIN)/python -m elizasql demo $(if $(FILE),--file "$(FILE)")

test: check pytest bench-check ## everything that is asked of a change

check: lint types lint-sql

lint: $(VENV)/installed-dev ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-dev ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy elizasql/sync.py

lint-sql: $(VENV)/installed-dev ## sqlfluff on sql/ and migrations/
	$(BIN)/sqlfluff lint --disable-progress-bar --processes 0 sql $(filter-out migrations/schema.sql,$(wildcard migrations/*.sql))

format: $(VENV)/installed-dev ## bring the Python files into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pytest: $(VENV)/installed-dev ## the tests, without the slow ones, in WORKERS processes
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow"

$(VENV)/installed-typing: $(VENV)/installed-dev
	$(PIP) install --quiet --group typing
	@touch $@

test-slow: $(VENV)/installed-typing ## the tests that take too long for every change
	$(BIN)/pytest -m slow --timeout 1800

test-faults: $(VENV)/installed-dev ## kills, broken networks, full disks: the long version
	$(BIN)/pytest tests/faults -s --timeout 1800

bench-check: $(VENV)/installed-dev ## each benchmark once, on tiny data
	ELIZASQL_BENCH=quick $(BIN)/pytest benchmarks --benchmark-disable -q

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) install --quiet --group bench
	@touch $@

bench: $(VENV)/installed-bench ## the benchmarks: 100,000 memories, tables of figures, a page with charts
	$(BIN)/pytest benchmarks --benchmark-enable -q -s --timeout 3600 --durations 20

bench-quick: $(VENV)/installed-bench ## the peers on 5,000 memories
	ELIZASQL_BENCH_ROWS=5000 $(BIN)/pytest benchmarks/test_peers.py --benchmark-enable -q -s --timeout 3600

bench-peers: $(VENV)/installed-bench ## the peers on 100,000 memories
	$(BIN)/pytest benchmarks/test_peers.py --benchmark-enable -q -s --timeout 3600

$(VENV)/installed-docs: $(VENV)/installed-dev
	$(PIP) install --quiet --group docs
	@touch $@

docs: $(VENV)/installed-docs ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

generate: $(VENV)/installed-dev ## write migrations/schema.sql and elizasql/sync.pyi anew
	$(BIN)/python -m tests.schema_dump
	$(BIN)/python -m tests.sync_stub

clean: ## remove what the other targets made, but not the data of the demo
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
