# Two commands: `make demo` and `make test`. Nothing is needed but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo install test test-all fuzz lint docs clean

install: .venv/installed

demo: .venv/installed
	$(BIN)/python jobs/demo.py

test: .venv/installed-dev lint
	$(BIN)/python -m pytest

test-all: .venv/installed-dev lint
	$(BIN)/python -m pytest -m "not gpu"

# Ten thousand broken and hostile files; `make test` runs five hundred of them.
fuzz: .venv/installed-dev
	ZFNET_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/test_fuzz.py

# The pages that the code writes, then the site, which fails on a link that leads nowhere.
docs: .venv/installed-dev
	$(BIN)/python docs/generate/tables.py
	$(BIN)/python docs/generate/commands.py
	$(BIN)/python docs/generate/cookbook.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

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
	rm -rf .venv site runs/demo shards/rendered .pytest_cache .mypy_cache .ruff_cache
