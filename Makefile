# Everything runs in .venv, made on first use from the pinned requirements.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint configs docs bench clean image image-test label-test deploy-test pacs-test wheel-test lock schema

demo: $(VENV)/.ready
	$(RUN) -m scripts.demo --output_dir demo_output --overwrite true

# A file's tests stay with one worker, so that nothing is set up twice; in their order, for the last files are short.
test: $(VENV)/.ready-dev
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/hadolint Dockerfile scripts/apps/monailabel/Dockerfile
	$(VENV)/bin/shellcheck .ci/*

# Stage 2's configuration from stage 1's and configs/stage2_changes.json; docs/training.md.
configs: $(VENV)/.ready
	$(RUN) -m scripts.runtime.stage_config

# The page of all options, docs/options.md.
docs: $(VENV)/.ready
	$(RUN) -m scripts.apps.command.option_tables

# Speed and memory, on cores that do nothing else; BENCH="--quick true" only shows that it runs,
# BENCH="--record true" keeps the figures.
BENCH ?=
BENCHMARKS := network.forward network.step network.memory network.labels loading.groups loading.wait

bench: $(VENV)/.ready-dev
	set -e; for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$${name%.*} $${name#*.} $(BENCH); done
	$(RUN) -m benchmarks.page

# The container image; docs/container.md. BUILD gives further arguments, such as --build-arg TORCH=cpu.
IMAGE ?= neuroverse3d
ENGINE ?= $(shell command -v podman || echo docker)
BUILD ?=
VERSION = $(shell sed -n 's/^    "version": "\(.*\)",/\1/p' configs/metadata.json)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)

image:
	$(ENGINE) build --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD) -t $(IMAGE) .

image-test:
	.ci/image-test

# The applications, each in an environment of its own; docs/monailabel.md, docs/deploy.md.
label-test:
	.ci/label-test

deploy-test:
	.ci/deploy-test

# Both against a PACS (Orthanc); .ci/pacs-test says what it needs.
pacs-test:
	.ci/pacs-test

# The wheel: built, installed into an empty environment, and the README's quick start run.
wheel-test:
	.ci/wheel-test

lock:
	.ci/lock

SCHEMA := $(shell sed -n 's/^    "schema": "\(.*\)",/\1/p' configs/metadata.json)

schema: $(VENV)/.ready
	$(RUN) -c 'import sys; from monai.apps.utils import download_url as get; \
	    get(sys.argv[1], sys.argv[2], hash_val="06954cad2cc5d3784e72077ac76f0fc8")' \
	    $(SCHEMA) schema/$(notdir $(SCHEMA))

clean:
	rm -rf $(VENV) .venv-label .venv-deploy .venv-pacs demo_output .pytest_cache .ruff_cache

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@
