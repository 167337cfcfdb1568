# Two commands for a newcomer: `make repro` and `make test`. Both set up .venv first if it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINES := .venv-engines

export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
# Threads that wait sleep: on a busy machine they would take the cores from those that work.
export OMP_WAIT_POLICY := passive
# A build starts ten processes and the tests start hundreds: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup doctor repro check test engines validate fuzz controls format clean

help:
	@echo "make repro     build the default recipe: download, fuse, verify, regress, gate"
	@echo "make doctor    does the default recipe fit this machine? fetches no file"
	@echo "make check     ruff, types, configuration"
	@echo "make test      the same, and the tests"
	@echo "make engines   do other engines draw from the exports? builds stable-diffusion.cpp; COMFYUI=folder COMFYUI_PYTHON=python for that too"
	@echo "make validate  is a LoRA as good as the current one? LORA=owner/name[@revision]:file RECIPE=name SCALE=1.0"
	@echo "make fuzz      odd inputs for every parser of foreign input, for FUZZ_SECONDS (one hour)"
	@echo "make controls  does the gate catch wrong merges and let harmless changes through? one minute"
	@echo "make setup     only make .venv"
	@echo "make format    let ruff format and fix"
	@echo "make clean     remove what the pipeline made (not the goldens)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"error: Python {v[0]}.{v[1]} is not supported, 3.11 to 3.13 is: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV): one or two minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

doctor: $(READY)
	@python -m stages.doctor

# An archive or a copy has no .git; DVC does without if it is told to, but for experiments.
repro: $(READY)
	@git rev-parse --git-dir >/dev/null 2>&1 || test -e .git || dvc config --local core.no_scm true
	@dvc repro --quiet; status=$$?; python -m stages.summary; exit $$status

check: $(READY)
	ruff format --check .
	ruff check .
	mypy --num-workers auto
	python -m stages.config --check

# Two workers a core, since many tests wait; the longest first; a module whose tests share a fixture in one worker
# (tests/conftest.py), and every other test in whichever is free.
test: check
	@python -m compileall -qq -j 0 lora_fuse stages pocket tests # once, and not in every checkout that a test makes
	@python -m lora_fuse fuse pocket/model build/warm --lora pocket/lora/pocket-lightning-4steps-v1.safetensors --quiet --replace
	@rm -rf build/warm*
	pytest -n auto --dist loadscope --no-loadscope-reorder

# The engines' own Python: quantisers and compilers that nothing else needs, and stable-diffusion.cpp, which is built once.
engines: $(ENGINES)/.ready
	$(ENGINES)/bin/python -m pytest -m engines -rA --tb=short tests/engines

$(ENGINES)/.ready: pyproject.toml constraints.txt tests/engines/build.py $(wildcard tests/engines/sdcpp/*)
	@echo "setting up $(ENGINES): some minutes, once"
	@$(PYTHON) -m venv $(ENGINES)
	@$(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,engines]'
	@PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" $(ENGINES)/bin/python -m tests.engines.build
	@touch $@

# LORA=owner/name[@revision]:file RECIPE=name SCALE=1.0, each may be left out. Make ends with 2 whatever the code of a
# failure is; 4, changed and to be looked at, is none.
validate: $(READY)
	@python -m stages.validate $${LORA:+"$$LORA"} $${RECIPE:+--recipe "$$RECIPE"} $${SCALE:+--scale "$$SCALE"} || [ $$? = 4 ]

# FUZZ_SEED repeats an earlier run. What fails is kept in .fuzz/, and is tried first the next time.
fuzz: $(READY)
	@python -m tests.fuzz --seconds $${FUZZ_SECONDS:-3600} $${FUZZ_SEED:+--seed "$$FUZZ_SEED"}

controls: $(READY)
	@python -m pocket.controls

format: $(READY)
	ruff format .
	ruff check --fix .

clean:
	rm -rf artifacts/merged artifacts/regression artifacts/export artifacts/release artifacts/*.json artifacts/.merged.* \
		artifacts/bases artifacts/variants artifacts/catalog
