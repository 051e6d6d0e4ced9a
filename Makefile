# Everything a developer or CI asks for. Needs Python 3.11 or newer with venv, make and git; all else comes from package registries.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
UV_VERSION := 0.13.9
# torch comes first and by plain pip: that is the small CPU build wherever pip is set up for it, and nothing else moves it later.
TORCH := torch==2.13.0
OVERRIDES := build/lock-overrides.txt
# Where pip trusts the certificates of the system, uv does too.
export UV_SYSTEM_CERTS ?= true

.DEFAULT_GOAL := help
.PHONY: help setup demo up test faults lint breaking settings check-gen gen lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment .venv with everything in it

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")'
	@echo "[1/4] virtual environment"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "[2/4] torch (the largest download)"
	@$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo "[3/4] dependencies"
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --no-deps -r requirements.txt
	@echo "[4/4] genmesh"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

# Nothing may be printed after `genmesh demo`: its last line, `saved PATH`, is what scripts read.
demo: $(STAMP) ## From nothing to a picture: start the mesh, draw one, show it, stop the mesh
	@$(BIN)/genmesh demo

up: $(STAMP) ## Keep the whole mesh running until Ctrl-C
	@$(BIN)/genmesh up

test: lint ## Lint, types, import rules, generated code, then all tests against the real stack
	$(BIN)/python -m pytest

faults: $(STAMP) ## Kill, pause and empty parts of a loaded mesh at random; FAULTS="--seed 7" replays a schedule
	@$(BIN)/python -m tests.faults $(FAULTS)

lint: $(STAMP) check-gen ## Everything that reads the code without running it
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/buf lint
	$(BIN)/squawk */migrations/versions/*.sql
	$(BIN)/python -m scripts.settings_table --check

breaking: $(STAMP) ## Fail if proto/ breaks clients of the main branch
	$(BIN)/buf breaking --against '.git#branch=main'

settings: $(STAMP) ## Write the table of docs/settings.md
	$(BIN)/python -m scripts.settings_table

gen: $(STAMP) ## Make stubs and descriptors from proto/
	PYTHON=$(BIN)/python scripts/generate_stubs.sh

check-gen: $(STAMP) ## Fail if committed stubs or descriptors differ from what proto/ makes
	PYTHON=$(BIN)/python scripts/check_generated.sh

lock: ## Pin every dependency of every extra in requirements.txt (torch excepted: see TORCH)
	@mkdir -p $(dir $(OVERRIDES))
	@echo "torch ; python_version < '3'" > $(OVERRIDES)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --override $(OVERRIDES) \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.txt

clean: ## Remove what was installed and built; the data of the embedded stack stays
	rm -rf .venv build
