# make demo and make test set everything up by themselves from a bare checkout. Nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all faults check fix clean

demo: $(INSTALLED)  ## train, measure and compare the four models on the embedded digits
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_accel reproduce --config configs/digits/reproduce.yaml

test: $(INSTALLED)  ## the tests that take less than about a second each: four minutes in all
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not faults"

test-all: $(INSTALLED)  ## all tests but `make faults`; what CI runs
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

faults: $(INSTALLED)  ## the long tests: kills, damages, fuzzing; what was tried and lost is printed and written to runs/faults.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -s -m faults

check: $(INSTALLED)  ## lint, docstrings, format, mypy --strict, layers; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

fix: $(INSTALLED)  ## what the linter and the formatter can fix themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
