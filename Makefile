# Each target installs what it needs into .venv first, so each of them works on a fresh clone.
PYTHON ?= python3
NODE_DIR := tests/node
VENV := .venv
BIN := $(VENV)/bin
# Signs of a task list of the user's own: a variable, the usual module, a line in a .env file.
ENV_FILES := $(foreach mode,development production,.env.$(mode) .env.$(mode).local) .env .env.local
OWN_TASKS = $(TASKS_CONFIG) $(wildcard tasks_config.py tasks_config/__init__.py) \
	$(shell grep -Els '^ *(export +)?TASKS_CONFIG *=' $(ENV_FILES))
# A task list for dev-worker and start-worker. Without any, dev-worker runs the examples.
# start-worker never does: they would complete real jobs of queues with the same names.
TASKS ?=
EXAMPLES := examples.tasks_config:tasks
DEV_TASKS = $(or $(TASKS),$(if $(strip $(OWN_TASKS)),,$(EXAMPLES)))
IMAGE ?= autoflow-worker
TESTS ?= tests examples
# Tests wait for servers more than they compute, so three of them run at once on each core.
CORES := $(PYTHON) -c 'import os; print(os.cpu_count() or 1)'
TEST_JOBS ?= $(shell echo $$((3 * $$($(CORES) 2>/dev/null || echo 2))))
CODE := src tests $(wildcard bench chaos examples parity scripts docs/upstream)

INSTALLED := $(VENV)/.installed
LOCKS := requirements
NODE_INSTALLED := $(NODE_DIR)/node_modules/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo dev-worker start-worker init-db test test-matrix lint format types lock \
	docker-build docker-run image-test bench chaos crashes parity upstream interleavings clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml $(LOCKS)/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes --requirement $(LOCKS)/dev.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(NODE_INSTALLED): $(addprefix $(NODE_DIR)/,package.json package-lock.json install) \
		$(LOCKS)/node.lock $(INSTALLED)
	$(NODE_DIR)/install $(BIN)/python
	@touch $@

setup: $(INSTALLED) $(NODE_INSTALLED) ## install everything that the other targets need

demo: $(INSTALLED) ## run some hundred jobs of every kind on embedded servers, and check each
	$(BIN)/autoflow-worker demo

dev-worker: $(INSTALLED) ## run your tasks, or the examples, with hot reload (TASKS=module:list)
	$(BIN)/autoflow-worker dev $(if $(DEV_TASKS),--tasks $(DEV_TASKS))

start-worker: $(INSTALLED) ## run your tasks in production mode (TASKS=module:list)
	$(if $(strip $(TASKS) $(OWN_TASKS)),,@echo "There is no task list here. \
	Try the examples: make start-worker TASKS=$(EXAMPLES)" >&2)
	NODE_ENV=$${NODE_ENV:-production} $(BIN)/autoflow-worker start $(if $(TASKS),--tasks $(TASKS))

init-db: $(INSTALLED) ## create the tasks table in DATABASE_URL where it is missing
	$(BIN)/autoflow-worker init-db

# The tests start some 200 worker processes; compiling the source in each would take half a minute.
test: export PYTHONDONTWRITEBYTECODE =
test: $(INSTALLED) $(NODE_INSTALLED) ## run the tests (TESTS=tests/unit, TEST_JOBS=4)
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal $(TESTS)

test-matrix: ## run the tests on each Python from 3.11 on that this machine has
	$(PYTHON) scripts/test_matrix.py

lint: $(INSTALLED) ## check the style and the format of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

types: $(INSTALLED) ## check the types with mypy --strict
	$(BIN)/mypy $(CODE)

lock: $(INSTALLED) ## rewrite requirements/*.lock from pyproject.toml (UPGRADE=1: newest versions)
	$(PIP_INSTALL) 'uv>=0.13,<0.14'
	$(BIN)/python -m scripts.lock $(if $(UPGRADE),--upgrade)

docker-build: ## build the image (IMAGE=name, BASE_IMAGE=python:3.13-slim)
	docker build --tag $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) .

docker-run: ## run the examples in the image, with Redis and PostgreSQL beside it
	docker compose up --build

image-test: $(INSTALLED) ## build the image without Docker, and run jobs through it (Debian, root)
	$(BIN)/python -m scripts.image_test

interleavings: $(INSTALLED) ## try 10,000 orders of writes to one row
	INTERLEAVINGS=10000 $(BIN)/python -m pytest -q \
		tests/integration/recording/test_never_backwards.py

bench: $(INSTALLED) $(NODE_INSTALLED) ## measure the worker beside Node's (17 minutes)
	$(BIN)/python -m bench

chaos: $(INSTALLED) $(NODE_INSTALLED) ## kill servers and workers at random, and check every row
	$(BIN)/python -m chaos

crashes: $(INSTALLED) $(NODE_INSTALLED) ## kill 100 workers at each crash point, and compare
	$(BIN)/python -m chaos.failpoints

parity: $(INSTALLED) $(NODE_INSTALLED) ## run 160 scenarios with Node's worker and with this one, and compare
	$(BIN)/python -m parity

upstream: $(INSTALLED) ## show the faults of bullmq that are reported in docs/upstream
	$(BIN)/python -m pytest -q tests/acceptance/test_upstream.py

clean: ## remove everything that make and its tools created
	rm -rf $(VENV) .venv-3.* $(NODE_DIR)/node_modules dist build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
