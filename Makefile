# Everything runs in .venv, made on first use with nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: demo test lint gpu report bench clean

demo: $(VENV)/.installed
	$(BIN)/fastattn demo

test: $(VENV)/.installed
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/fastattn bench

gpu:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu

report: $(VENV)/.installed
	$(RUN) -m benchmarks.compile_report

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fastattn needs Python 3.10 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
