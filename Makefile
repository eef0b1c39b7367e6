# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
NODE_DIR := tests/node
VENV := .venv
BIN := $(VENV)/bin
# Where the user's own task list is named: by a variable, by its usual name, or in a .env file.
ENV_FILES := .env .env.development .env.local .env.development.local
OWN_TASKS = $(TASKS_CONFIG) $(wildcard tasks_config.py tasks_config/__init__.py) \
	$(shell grep -Els '^ *(export +)?TASKS_CONFIG *=' $(ENV_FILES))
TASKS ?= $(if $(strip $(OWN_TASKS)),,examples.tasks_config:tasks)
IMAGE ?= autoflow-worker
TESTS ?= tests
# The tests wait for servers more than they compute, so three times as many of them as there are cores run at once.
TEST_JOBS ?= $(shell $(PYTHON) -c 'import os; print(3 * (os.cpu_count() or 1))' 2>/dev/null || echo 6)
CODE := src tests $(wildcard bench chaos examples scripts)

INSTALLED := $(VENV)/.installed
LOCKS := requirements
NODE_INSTALLED := $(NODE_DIR)/node_modules/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo dev-worker start-worker init-db test test-matrix lint format types lock docker-build docker-run image-test bench chaos crashes interleavings clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml $(LOCKS)/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes --requirement $(LOCKS)/dev.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(NODE_INSTALLED): $(NODE_DIR)/package.json $(NODE_DIR)/package-lock.json $(NODE_DIR)/install $(LOCKS)/node.lock $(INSTALLED)
	$(NODE_DIR)/install $(BIN)/python
	@touch $@

setup: $(INSTALLED) $(NODE_INSTALLED) ## create .venv with everything

demo: $(INSTALLED) ## run some hundred jobs of every kind on embedded servers, and check them
	$(BIN)/autoflow-worker demo

dev-worker: $(INSTALLED) ## run the worker with hot reload: your tasks, else the examples (TASKS=module:attribute)
	$(BIN)/autoflow-worker dev $(if $(TASKS),--tasks $(TASKS))

start-worker: $(INSTALLED) ## run the worker as in production: needs REDIS_URL, DATABASE_URL and tasks
	NODE_ENV=$${NODE_ENV:-production} $(BIN)/autoflow-worker start

init-db: $(INSTALLED) ## create the tasks table in DATABASE_URL if it is missing
	$(BIN)/autoflow-worker init-db

# The tests start some 200 worker processes; compiling the source in each would take half a minute.
test: export PYTHONDONTWRITEBYTECODE =
test: $(INSTALLED) $(NODE_INSTALLED) ## run the tests (TESTS=tests/unit, TEST_JOBS=4)
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal $(TESTS)

test-matrix: ## run the tests on each Python from 3.11 on that this machine has (TESTS, TEST_JOBS as above)
	$(PYTHON) scripts/test_matrix.py

lint: $(INSTALLED) ## check the code's style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## format the code, and mend what can be mended
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

types: $(INSTALLED) ## check the types, strictly
	$(BIN)/mypy $(CODE)

lock: $(INSTALLED) ## write requirements/*.lock anew after a change of pyproject.toml (UPGRADE=1: the newest versions)
	$(PIP_INSTALL) 'uv>=0.13,<0.14'
	$(BIN)/python -m scripts.lock $(if $(UPGRADE),--upgrade)

docker-build: ## build the image (IMAGE=name, BASE_IMAGE=python:3.13-slim)
	docker build --tag $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) .

docker-run: ## run the image with Redis and PostgreSQL beside it
	docker compose up --build

image-test: $(INSTALLED) ## build the image without Docker, run jobs through it, stop it (Debian, root)
	$(BIN)/python -m scripts.image_test

interleavings: $(INSTALLED) ## drive 10,000 interleavings of claims, writes, stalls, cancels through one row
	INTERLEAVINGS=10000 $(BIN)/python -m pytest -q tests/integration/recording/test_never_backwards.py

bench: $(INSTALLED) $(NODE_INSTALLED) ## measure jobs per second
	$(BIN)/python -m bench

chaos: $(INSTALLED) $(NODE_INSTALLED) ## break servers and workers at random under load, and check every row
	$(BIN)/python -m chaos

crashes: $(INSTALLED) $(NODE_INSTALLED) ## kill a worker a hundred times at each point of a job's life, and compare the stores
	$(BIN)/python -m chaos.failpoints

clean: ## remove everything that make and the tools created
	rm -rf $(VENV) .venv-3.* $(NODE_DIR)/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
