# Everything runs in .venv, made on first use with nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: demo test lint gpu pretended real report bench clean

demo: $(VENV)/.installed
	$(BIN)/fastattn demo

test: $(VENV)/.installed
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Weights of real models for the tests marked `real`, 600 MB, into the cache folder that tests/real_models.py names.
real: $(VENV)/.installed
	$(RUN) tests/real_models.py

bench: $(VENV)/.installed
	$(BIN)/fastattn bench

gpu:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu

# Every public call on pretended GPUs, under the oldest Triton we serve and the newest; compiled kernels are kept.
# `make pretended OF=16 FROM=3` makes two of sixteen shares of the calls only, the 3rd and the 4th; ONLY="together" those
# that are named so. Under the oldest Triton kernels are assembled, too: one that spills registers is a failure.
# UNTIL=ttir leaves out what follows the compiler's front end: most of the time, and seldom what another Triton breaks.
OF := 2
FROM := 1
ONLY :=
UNTIL :=
OLDEST := 3.6.0
NEWEST := 3.9.0
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fastattn/pretended_gpu

pretended: $(VENV)-triton-$(OLDEST)/.installed $(VENV)-triton-$(NEWEST)/.installed
	for version in $(OLDEST) $(NEWEST); do \
	until=$(or $(UNTIL),ptx); test "$$version$(UNTIL)" != $(OLDEST) || until=cubin; \
	for share in $(FROM)/$(OF) $$(($(FROM) + 1))/$(OF); do \
		TRITON_CACHE_DIR=$(CACHE)-$$version $(VENV)-triton-$$version/bin/python -m tests.pretended_gpu \
			--each-on-one --share $$share --only "$(ONLY)" --until $$until & \
	jobs="$$jobs $$!"; done; for job in $$jobs; do wait $$job || exit 1; done; jobs=; done

# That Triton alone; all else, torch included, is $(VENV)'s.
$(VENV)-triton-%/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps triton==$*
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth
	touch $@

report: $(VENV)/.installed
	$(RUN) -m benchmarks.compile_report

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fastattn needs Python 3.10 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton-* build dist *.egg-info
