# Two commands for newcomers: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
BIN := $(VENV)/bin

.PHONY: demo test lint prove clean

$(VENV)/.node: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[node]'
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.node

demo: $(VENV)/.node
	$(BIN)/azu demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -m 'not prove'

prove: $(VENV)/.dev
	$(BIN)/python -m tests.prove --seed $(SEED)

clean:
	rm -rf $(VENV)
