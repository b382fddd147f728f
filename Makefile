# Everything runs in .venv, made on first use from the pinned requirements.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(RUN) -m scripts.demo --output_dir demo_output --overwrite true

test: $(VENV)/.ready-dev
	$(RUN) -m pytest

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.ready
	$(RUN) -m benchmarks.flat_memory
	$(RUN) -m benchmarks.pass_memory

clean:
	rm -rf $(VENV) demo_output .pytest_cache .ruff_cache

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@
