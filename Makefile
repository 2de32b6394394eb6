# make train   the main job, on the handwritten digits of scikit-learn: a table, a plot and a record
# make test    all tests
# make check   all tests, and lint, format, types and imports
#
# Each makes its own .venv with pinned versions; PYTHON chooses the interpreter (3.11 or later).

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test check lint clean

train: .venv/train.stamp
	$(BIN)/kaisa train $(ARGS)

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

check: lint test

lint: .venv/check.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kaisa needs Python 3.11 or later; give make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/train.stamp: .venv/made.stamp pyproject.toml constraints.txt
	$(INSTALL) --editable ".[train]"
	touch $@

.venv/test.stamp: .venv/made.stamp pyproject.toml constraints.txt requirements-oracles.txt
	$(INSTALL) --editable ".[test]"
	$(INSTALL) --no-deps --requirement requirements-oracles.txt
	touch $@

.venv/check.stamp: .venv/test.stamp
	$(INSTALL) --editable ".[check]"
	touch $@
