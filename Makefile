# Everything that a fresh machine with Python 3.11 or newer needs:
#   make quickstart   the main job on real weights and a real image, to runs/quickstart/report.html
#   make test         the whole test suite, two tests at a time (TEST_PROCESSES=8 on a larger machine)
#   make faults       kill, starve and deceive runs in a few hundred ways; the table is benchmarks/results/faults.md
#   make bench        every claim about speed measured here, side by side with its reference, to benchmarks/README.md;
#                     45 to 75 minutes on two cores, and nothing else should run (make bench QUICK=1: small sizes,
#                     nothing kept)
# Finished steps are kept; `make clean-quickstart` forgets the run, `make clean` the environment too.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help quickstart test faults bench lint format clean clean-quickstart

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,\
  $(if $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo yes),$(p))))
VENV ?= .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
RUN := runs/quickstart
RECIPE := recipes/quickstart.yaml
SPEC := data_shards/catalogue/icbm152_white_matter.yaml

help:
	@sed -n 's/^#   //p' Makefile

# --- environment

# The tests try every tuning method on SAM2's encoder too. By itself it would be built with another copy of torch.
SAM2 := SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation 'sam2==1.1.0'

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: error: no Python >= 3.11 found; install one or say make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: error: $(PYTHON) cannot make a venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.quickstart $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "installing sam-trainer[$*]: a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@$(if $(filter dev,$*),$(SAM2))
	@touch $@

# --- the main job

quickstart: $(RUN)/report.html
	@$(BIN)/trainer report $(RUN)

$(RUN)/shards/manifest.json: $(SPEC) | $(VENV)/.quickstart
	@echo "== shards from a real volume"
	@$(BIN)/data-shards build $(SPEC) --out $(RUN)/shards --overwrite
	@$(BIN)/data-shards verify $(RUN)/shards
	@touch $@

$(RUN)/evaluation/untouched/per_case.csv: $(RECIPE) $(RUN)/shards/manifest.json
	@echo "== the untouched weights on unseen slabs"
	@$(BIN)/trainer test -c $(RECIPE)

# An interrupted training goes on where it was; a changed recipe starts anew.
$(RUN)/.fitted: $(RECIPE) $(RUN)/shards/manifest.json | $(RUN)/evaluation/untouched/per_case.csv
	@echo "== fine-tuning: three to five minutes on two cores"
	@cmp -s $(RECIPE) $(RUN)/.recipe || { rm -rf $(RUN)/checkpoints $(RUN)/logs $(RUN)/trace.csv; cp $(RECIPE) $(RUN)/.recipe; }
	@$(BIN)/trainer fit -c $(RECIPE) --ckpt_path last
	@touch $@

$(RUN)/evaluation/tuned/per_case.csv: $(RUN)/.fitted
	@echo "== the tuned weights on the same slabs"
	@$(BIN)/trainer test -c $(RECIPE) --ckpt_path last

$(RUN)/exports/litemedsam/model.pth: $(RUN)/.fitted
	@echo "== export, checked by the tool that will read it"
	@$(BIN)/trainer export $(RUN) --to litemedsam --out $@

$(RUN)/report.html: $(RUN)/evaluation/untouched/per_case.csv $(RUN)/evaluation/tuned/per_case.csv $(RUN)/exports/litemedsam/model.pth
	@$(BIN)/trainer report $(RUN) > /dev/null

# --- development

test: $(VENV)/.dev
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal --durations 40

faults: $(VENV)/.dev
	@$(BIN)/python tests/faults/run.py --out benchmarks/results/faults.md

# What one benchmark finds does not end the others; the page shows what each found last.
bench: $(VENV)/.dev
	@failed=(); while read -r -a line; do \
	  echo "== $${line[*]}"; \
	  $(BIN)/python benchmarks/"$${line[@]}" $(if $(QUICK),--quick,--save) < /dev/null || failed+=("$${line[0]}"); \
	done < <($(BIN)/python benchmarks/rendering.py --names); \
	$(if $(QUICK),,$(BIN)/python benchmarks/rendering.py;) \
	if (($${#failed[@]})); then echo "make: error: failed: $${failed[*]}" >&2; exit 1; fi

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean-quickstart:
	rm -rf $(RUN)

clean: clean-quickstart
	rm -rf $(VENV)
