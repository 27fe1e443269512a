# Everything a newcomer needs: make demo, make test. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow check clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed

# The main job on the embedded data: a trained teacher, a sweep of eight students, a report.
demo: $(VENV)/.installed
	$(BIN)/python -m orchestrator.sweep d3still_beta_gamma
	$(BIN)/python -m orchestrator.report d3still_beta_gamma

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

# What needs minutes: killed drivers, Ray's dashboard.
slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) dist build
