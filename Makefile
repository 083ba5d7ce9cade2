# Two commands: `make demo` and `make test`. Nothing is needed but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint docs clean

demo: .venv/installed
	$(BIN)/python jobs/demo.py

test: .venv/installed-dev lint
	$(BIN)/python -m pytest

test-all: .venv/installed-dev lint
	$(BIN)/python -m pytest -m "not gpu"

# Pages that the code writes: the reference of the tables.
docs: .venv/installed-dev
	$(BIN)/python docs/generate/tables.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# constraints.txt makes two installs equal; the stamps make the second call quick.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs/demo shards/rendered .pytest_cache .mypy_cache .ruff_cache
