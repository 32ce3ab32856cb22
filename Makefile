# Each target installs what it needs into .venv, from a bare checkout. Nothing is installed outside of it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
FAST := not slow and not alone and not faults
PAGE ?= runs/digits/report/index.html

.PHONY: demo page docs test test-all faults check fix clean

demo: $(INSTALLED)  ## train, measure and compare the four models on the embedded digits
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_accel reproduce configs/digits/reproduce.yaml

page: $(INSTALLED)  ## render the page of a report in headless Chromium, light and dark; a message on the console is an error
	$(BIN)/python -m tests.report.browser $(PAGE)

docs: $(INSTALLED)  ## the documentation site, in site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(INSTALLED)  ## fast tests, then a real proof of each promise with several processes
	$(PYTEST) $(PARALLEL) -m "$(FAST)"
	$(PYTEST) -m "(slow and proof or alone and not slow) and not faults"

test-all: $(INSTALLED)  ## all tests but `make faults`; what CI runs
	$(PYTEST) $(PARALLEL) -m "$(FAST)"
	$(PYTEST) -n 2 --dist loadfile -m "slow and not alone and not faults"
	$(PYTEST) -m "alone and not faults"

faults: $(INSTALLED)  ## kills, damage and fuzzing at length; the record is printed and saved in runs/faults.json
	$(PYTEST) -s -m faults

check: $(INSTALLED)  ## lint, docstrings, format, mypy --strict, layers, retired identifiers, language; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_counts.py tests/test_english.py

fix: $(INSTALLED)  ## what the linter and the formatter can fix themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
