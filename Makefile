# make demo    make test    make check    make docs    make vllm    make dist    make oldest    make clean    make help
#
# PYTHON=python3.12   the Python to build .venv with; else the first that works of those in scripts/setup_venv.sh
# CONSTRAINTS=        install the newest versions (on a GPU machine: the newest torch) and not the tested ones

VENV = .venv
BIN = $(VENV)/bin
MODEL = models/SmolLM2-135M-Instruct
CONSTRAINTS = tests/constraints.txt
INSTALL = $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install \
	$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable
# Tests of what a machine does to a process run by themselves, after the others, which run two files at a time.
ALONE = tests/common tests/job tests/memory tests/slurm
export PYTHON

help:
	@echo 'make demo    set up .venv and a small model (3 minutes at first), then run a job'
	@echo 'make test    set up the same and the test tools, then run all tests'
	@echo 'make check   format, lint, types and the house'
	@echo 'make docs    write docs/reference.md, build the site of docs/ to .cache/site'
	@echo 'make vllm    make the environment of engine=vllm, in ~/.cache (3 GB, once)'
	@echo 'make dist    build wheel and sdist to dist/, and check them'
	@echo 'make oldest  run a job with the oldest versions allowed (3 GB to download)'
	@echo 'make clean   remove .venv and caches; models/ and outputs/ stay'

demo: $(VENV)/run.stamp $(MODEL)/config.json
	$(BIN)/python -m pipeline demo

test: $(VENV)/test.stamp $(MODEL)/config.json vllm
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore=%) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(ALONE) $(PYTEST_ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/hadolint scripts/Containerfile
	$(BIN)/python -m pytest --quiet tests/test_house.py

docs: $(VENV)/test.stamp
	$(BIN)/python scripts/reference.py
	$(BIN)/python -m mkdocs --quiet build

vllm:
	@scripts/setup_vllm.sh

oldest: $(VENV)/run.stamp $(MODEL)/config.json
	scripts/try_oldest.sh $(BIN)/python models

dist: $(VENV)/test.stamp
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps are as new as the last installation; what decides it is to their right.
$(VENV)/run.stamp: pyproject.toml tests/constraints.txt
	@scripts/setup_venv.sh $(VENV)
	@$(INSTALL) '.[cpu,gguf,report]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@echo 'Adding the test tools'
	@$(INSTALL) '.[adapters,test,slurm]'
	@touch $@

$(MODEL)/config.json: $(VENV)/run.stamp
	@$(BIN)/python -m pipeline demo fetch=only
	@touch $@ # newer than the environment, so that make does not ask again

.PHONY: help demo test check docs vllm dist oldest clean
