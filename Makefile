# Two commands need nothing before them but Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
# Of what pip prints, the signs of life; its errors go past this. A pipe ends with the status of its last command, so pip's own is kept.
PROGRESS := /^ *(Collecting|Downloading|Using cached|Building|Installing|Successfully)/

.PHONY: help venv demo test lint bench clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

venv: $(INSTALLED)  ## Create .venv and install sane_ray with its tested versions
	@echo "ready: source .venv/bin/activate, or call $(BIN)/python"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed, $$($(PYTHON) --version) was found: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time, about 2 GB)"
	@{ $(BIN)/pip install --disable-pip-version-check --progress-bar off $(PIP_FLAGS) -c constraints.txt -e '.[dev]'; \
	  echo $$? > .venv/pip-status; } | awk '$(PROGRESS) { print substr($$0, 1, 100); fflush() }'; \
	exit "$$(cat .venv/pip-status)"
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## Zoo -> token store -> pretrained SANE on real data, in minutes
	$(BIN)/python jobs/pretrain.py

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## Measure: store I/O, alignment, preprocessing, a large model, the stream, the training step, embedding, sampling
	$(BIN)/python benchmarks/store_io.py
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/python benchmarks/published_preprocessing.py
	$(BIN)/python benchmarks/large_model.py --layers 2
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/embedding.py
	$(BIN)/python benchmarks/sampling.py

clean:  ## Remove the environment and caches; results stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
