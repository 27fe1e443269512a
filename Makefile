# Everything a newcomer needs. PYTHON chooses the interpreter, VENV the environment.
#   make demo     the main job on embedded data: a trained teacher, a sweep of eight students, a report
#   make test     the default tests, minutes on two cores; the slowest are listed
#   make slow     what needs longer: full-size data and networks, every export, the rest of Ray, faults and servers
#   make night    killed drivers and killed preparations of single sweeps: half an hour
#   make numbers  a fixed small sweep of every system against stored numbers: minutes
#   make check    lint, format, and that imports point down
#   make clean    removes the environment and built packages
PYTHON ?= python3
VENV ?= .venv
SLOW ?= slow and not night and not numbers
BIN := $(VENV)/bin

.PHONY: demo test slow night numbers check install clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed

# With what the tests need.
install: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/python -m orchestrator.sweep d3still_beta_gamma
	$(BIN)/python -m orchestrator.report d3still_beta_gamma

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=15

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "$(SLOW)" -n 2 --dist loadfile --no-loadscope-reorder --durations=15

night: install
	$(BIN)/python -m pytest -q -m night --durations=5

numbers: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/system/test_numbers.py -n 2 --durations=5

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) dist build
