.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/installed
KERNELS := $(VENV)/mamba/installed
SITE := $(VENV)/docs-installed
DEMO := runs/tiny
# Settings that make the demo smaller, for CI: make demo DEMO=runs/ci DEMO_ARGS=debug=one_step
DEMO_ARGS :=
# Releases of transformers that must read what is written: tests/compat.
COMPAT := 5.8.0 5.10.4 5.20.0 5.23.0 5.24.0

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The Triton kernels, for tests that interpret them on a CPU. Not among the packages of .venv: stock
# transformers calls GPU kernels on CPU tensors wherever mamba_ssm can be imported. And not pinned in
# constraints.txt: a CUDA build of torch wants a triton of its own.
$(KERNELS): $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) triton==3.9.0 einops==0.8.2
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) install --quiet --no-deps \
		--no-build-isolation --target $(@D) mamba-ssm==2.3.2.post1
	touch $@

$(SITE): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	touch $@

install: $(STAMP)  ## make .venv with everything that the other targets need

demo: $(STAMP)  ## train the tiny family, cut its members out, and show what they can do
	$(BIN)/python train.py run_dir=$(DEMO) $(DEMO_ARGS)
	rm -rf $(DEMO)/members
	$(BIN)/python extract.py checkpoint=$(DEMO)/elastic budget=medium output=$(DEMO)/members/medium
	$(BIN)/python extract.py checkpoint=$(DEMO)/elastic budget=small output=$(DEMO)/members/small
	$(BIN)/python -m elastic.evaluate run_dir=$(DEMO) members=$(DEMO)/members

test: lint types $(KERNELS)  ## lint, types and the whole suite, one worker per core
	$(BIN)/python -m pytest -n auto --dist loadfile

test-long: $(KERNELS)  ## what takes longer: kills, full disks, all strategies, every command
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow --durations 10

test-slurm: $(STAMP)  ## slurm/ and hydra/launcher=slurm on a real Slurm of one machine
	tests/slurm/install
	$(BIN)/python -m pytest tests/slurm/real.py -v -s

docs: $(SITE)  ## build the guides in docs/ as a site, into build/docs; warnings are errors
	$(BIN)/python -m sphinx -E -a -W --keep-going -q -d build/doctrees docs build/docs

# Other releases of transformers with the tokenizers and the hub that they want, each in a folder for
# PYTHONPATH: torch and all else are those of .venv.
OF_5_8 := huggingface-hub==1.33.0 tokenizers==0.22.2
OF_5_20 := huggingface-hub==2.4.0 tokenizers==0.23.3
$(VENV)/compat-%/installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) transformers==$* \
		$(if $(filter 5.8.0 5.10.4,$*),$(OF_5_8),$(OF_5_20))
	touch $@

test-compat: $(COMPAT:%=$(VENV)/compat-%/installed)  ## exports in other releases of transformers
	$(BIN)/python -m pytest tests/compat/real.py -v -s

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

format: $(STAMP)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets above have made, .venv and runs included
	rm -rf $(VENV) runs out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help install demo test test-long test-slurm test-compat docs lint types format clean
