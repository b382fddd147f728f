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

# About 40 minutes on two cores that do nothing else; BENCH="--quick true" only shows that all of it runs.
BENCH ?=
BENCHMARKS := startup forward flat_memory bfloat16_memory bfloat16_dice many_labels training_step data_path loader_wait context_curve

bench: $(VENV)/.ready-dev
	set -e; for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name $(BENCH); done
	$(RUN) -m benchmarks.table

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
