# Two commands for newcomers: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
BIN := $(VENV)/bin
MONEY := tests/money tests/auth tests/jobs tests/launch
ENGINE := tests/engine tests/models tests/bench
PARTS := test-cluster test-money test-engine test-rest

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

# Four processes share the tests: most of them wait for others more than they compute.
test: lint
	@echo 'Four parts run side by side; each shows its tests when it ends.'
	@$(MAKE) --no-print-directory --jobs=4 --keep-going --output-sync=target $(PARTS)

.PHONY: $(PARTS)
test-cluster:
	$(BIN)/pytest -q -m 'cluster and not prove'

test-money:
	$(BIN)/pytest -q -m 'not cluster and not prove' $(MONEY)

test-engine:
	$(BIN)/pytest -q -m 'not cluster and not prove' $(ENGINE)

test-rest:
	$(BIN)/pytest -q -m 'not cluster and not prove' $(patsubst %,--ignore=%,$(MONEY) $(ENGINE))

house: $(VENV)/.dev
	$(BIN)/python -m tests.house $(BEFORE) .

prove: types
	$(BIN)/pip install --quiet --editable '.[prove]'
	$(BIN)/python -m tests.prove --seed $(SEED)

clean:
	rm -rf $(VENV)
