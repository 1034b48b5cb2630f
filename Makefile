# Two commands for newcomers: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
BIN := $(VENV)/bin
FIRST := tests/money tests/auth tests/jobs tests/launch

.PHONY: demo test lint types house prove clean

$(VENV)/.node: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[node]'
	@touch $@

# Without --no-compile the installation also compiles thousands of files that nothing imports.
$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
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

# Two processes share the tests: those that need the cluster mostly wait, so that process takes some of the others too.
test: lint
	@{ $(BIN)/pytest -q -m 'cluster and not prove'; first=$$?; \
	   $(BIN)/pytest -q -m 'not cluster and not prove' $(FIRST) && exit $$first; } >$(VENV)/first.log 2>&1 & first=$$!; \
	$(BIN)/pytest -q -m 'not cluster and not prove' $(FIRST:%=--ignore=%); status=$$?; \
	wait $$first || status=1; cat $(VENV)/first.log; exit $$status

house: $(VENV)/.dev
	$(BIN)/python -m tests.house $(BEFORE) .

prove: types
	$(BIN)/pip install --quiet --editable '.[prove]'
	$(BIN)/python -m tests.prove --seed $(SEED)

clean:
	rm -rf $(VENV)
