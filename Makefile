# make demo     a virtual environment, the package, and the main job on a real data set: model, predictions, report
# make test     everything that must hold: format, lint, types, import floors, documentation, tests and examples
# make format   put the code into the one format
# make docs     the documentation as HTML, in docs/_build/html
# make nightly  what takes hours: the sampled tests of the masks at 20 times their size, the battery, every mutant
# make battery  dieharder on the bits of the masks, into docs/battery.txt; needs the program dieharder
# make mutation changes the kernels in one place at a time, and says which change no test notices
# make peers    an environment in .peers for `dropkit bench --slow "committee-*"`, with the packages compared with
# make clean    remove what the targets above made
#
# Another interpreter: make test PYTHON=python3.12

VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
PEERS ?= .peers
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
CHECK_TORCH := $(BIN)/python .ci/check_torch.py constraints.txt $(if $(filter true 1,$(CI)),--cpu)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test format docs clean nightly battery mutation peers

help:
	@sed -n 's/^# //p' Makefile

# One stamp a stage, so that a second run installs nothing. torch comes first and alone: what follows finds it there.
$(VENV)/made-torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer was found; give one: make ... PYTHON=/path/to/python"; exit 1; }
	@echo "== virtual environment in $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== installing torch"
	@$(PIP) torch
	@touch $@

$(VENV)/made-package: $(VENV)/made-torch pyproject.toml
	@echo "== installing dropkit"
	@$(PIP) --editable .
	@$(CHECK_TORCH)
	@touch $@

$(VENV)/made-dev: $(VENV)/made-package
	@echo "== installing what the checks need"
	@$(PIP) --editable '.[dev]'
	@$(CHECK_TORCH)
	@touch $@

$(VENV)/made-peers: $(VENV)/made-package constraints-peers.txt
	@echo "== installing the peers"
	@$(PIP) --no-deps --requirement constraints-peers.txt
	@$(CHECK_TORCH)
	@touch $@

peers:
	@$(MAKE) --no-print-directory VENV=$(PEERS) $(PEERS)/made-peers
	@echo "Peers:        $(PEERS)/bin/dropkit bench --slow 'committee-*'"

demo: $(VENV)/made-package
	@echo "== dropkit fit"
	@mkdir -p $(DEMO)
	@$(BIN)/dropkit fit --out $(DEMO)/model --force
	@echo "== dropkit predict"
	@$(BIN)/dropkit predict $(DEMO)/model --out $(DEMO)/predictions.csv --force
	@echo
	@echo "Model:        $(DEMO)/model"
	@echo "Predictions:  $(DEMO)/predictions.csv"
	@echo "Report:       $(abspath $(DEMO))/model/report.html"

# $(call step,NAME,COMMAND): says what runs, and which step it was that failed.
define step
	@printf '\n== %s\n' '$(1)'
	@$(2) || { printf '\nmake test stopped: %s failed.\n' '$(1)' >&2; exit 1; }
endef

test: $(VENV)/made-dev
	$(call step,format,$(BIN)/ruff format --check .)
	$(call step,lint,$(BIN)/ruff check .)
	$(call step,types,$(BIN)/mypy)
	$(call step,import floors,$(BIN)/lint-imports --no-cache --no-logo)
	$(call step,changelog,$(BIN)/towncrier build --draft --version next > /dev/null 2>&1)
	$(call step,documentation,$(BIN)/sphinx-build -q -W -E --keep-going -b html docs docs/_build/html)
	$(call step,tests and examples,$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS))

format: $(VENV)/made-dev
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/made-dev
	@$(BIN)/sphinx-build -q -W -E --keep-going -b html docs docs/_build/html
	@echo "Documentation: $(abspath docs/_build/html)/index.html"

battery: $(VENV)/made-dev
	@$(BIN)/python benchmarks/battery.py run --out docs/battery.txt $(BATTERY_ARGS)

mutation: $(VENV)/made-dev
	@$(BIN)/python benchmarks/mutation.py $(MUTATION_ARGS)

nightly: $(VENV)/made-dev
	@DROPKIT_TRUST_SCALE=20 $(BIN)/pytest --timeout 7200 tests/test_trust_statistics.py tests/test_trust_equality.py
	@$(MAKE) --no-print-directory battery mutation

clean:
	rm -rf $(VENV) $(PEERS) $(DEMO) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
