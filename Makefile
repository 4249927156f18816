# Two commands matter: `make run` shows the zoo at work, `make test` proves it. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test test-slow record lint catalog site screenshots clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

run: $(STAMP) ## prune a real pretrained language model, side by side with the dense one
	$(BIN)/zoo run flap

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP) ## run the heavy tests too
	$(BIN)/python -m pytest -m slow

record: $(STAMP) ## run contracts and golden cases, and write down what is verified
	$(BIN)/python -m pytest tests/test_card_contracts.py tests/test_golden.py --record --deselect tests/test_card_contracts.py::test_recorded_ticks_are_those_that_are_tested
	$(BIN)/zoo catalog build

lint: $(STAMP) ## style, types, catalogue and site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zoo catalog check
	$(BIN)/zoo site build

catalog: $(STAMP) ## rebuild catalog.sqlite from cards, bibliography and measurements
	$(BIN)/zoo catalog build

site: $(STAMP) ## build the site into site/public
	$(BIN)/zoo site build

clean: ## remove what was built
	rm -rf $(VENV) site/public .pytest_cache .mypy_cache .ruff_cache
