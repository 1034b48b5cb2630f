# Two commands for newcomers: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
BIN := $(VENV)/bin

.PHONY: demo test lint types house prove clean

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
	$(BIN)/lint-imports
	$(BIN)/vulture

# Strict types take a minute from cold, so `make prove` checks them and not every test run.
types: $(VENV)/.dev
	$(BIN)/mypy

# The tests that need the cluster run beside those that do not: one waits where the other computes.
test: lint
	@$(BIN)/pytest -q -m 'cluster and not prove' >$(VENV)/cluster.log 2>&1 & cluster=$$!; \
	$(BIN)/pytest -q -m 'not cluster and not prove'; status=$$?; \
	wait $$cluster || status=1; cat $(VENV)/cluster.log; exit $$status

# The tree in figures. BEFORE is a checkout of an older commit, which becomes a column beside it.
house: $(VENV)/.dev
	$(BIN)/python -m tests.house $(BEFORE) .

prove: types
	$(BIN)/pip install --quiet --editable '.[prove]'
	$(BIN)/python -m tests.prove --seed $(SEED)

clean:
	rm -rf $(VENV)
