# Every target does its own set-up: a machine with make and Python 3.11 or later is enough.
# All that is installed goes into .venv; remove that folder to start over.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PIP := --disable-pip-version-check --no-input --quiet
DOCKERFILES := Dockerfile
COMPOSE_FILES := docker-compose.yml
GITLAB_FILES := docs/examples/rotate-keys.gitlab-ci.yml
GITHUB_FILES := docs/examples/rotate-keys.github.yml

# make PYTHON=/path/to/python3.13 takes another interpreter.
PYTHON ?=

.PHONY: help setup demo test pytest lint format bench proto prove interop clean

help: ## Show this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do printf '%-15s %s\n' "$$target" "$$text"; done

setup: $(VENV)/.installed $(VENV)/proto/.installed ## Install everything into .venv

demo: $(VENV)/.installed ## Run the main job end to end on a real Vault, with a transcript
	@$(BIN)/carnet-broker demo

test: lint pytest ## Run the linters and all tests; 100 % branch coverage for the core and the verifier

pytest: setup ## The tests of make test, without the linters
	@tests/run.sh

lint: $(VENV)/.installed ## Run ruff, mypy, import-linter, buf, hadolint and the schema checks
	@echo "== ruff"
	@$(BIN)/ruff format --check --quiet . || { echo "make: run 'make format'" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@echo "== mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "== import-linter"
	@$(BIN)/lint-imports --no-logo > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "== buf"
	@$(BIN)/buf lint protos
	@echo "== hadolint"
	@$(BIN)/hadolint $(DOCKERFILES)
	@echo "== schemas"
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec $(COMPOSE_FILES)
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci $(GITLAB_FILES)
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows $(GITHUB_FILES)
	@echo "lint: all passed"

format: $(VENV)/.installed ## Format the code and apply the safe fixes of ruff
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed ## Measure speed
	@$(call need,tests/bench/run.py)
	@$(BIN)/python tests/bench/run.py

proto: $(VENV)/proto/.installed ## Generate the Python stubs of protos/ again
	@protos/generate.sh
	@echo "proto: client/carnet/v1 is up to date"

prove: $(VENV)/.installed ## Run the long proofs with full counts, and write docs/measurements
	@$(call need,tests/prove/run.py)
	@$(BIN)/python tests/prove/run.py

interop: $(VENV)/.installed ## Run the foreign parts from npm and Debian against the broker
	@$(call need,tests/interop/run.py)
	@$(BIN)/python tests/interop/run.py

clean: ## Remove all that make has made
	rm -rf $(VENV) .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist

# A target without content says so and fails: nothing passes by not being there.
define need
test -f $(1) || { echo "make $@: $(1) does not exist: this target has no content yet" >&2; exit 1; }
endef

$(VENV)/.created:
	@python=; \
	for candidate in $(PYTHON) python3.11 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "make: no Python 3.11 or later found: install one, or say which with make PYTHON=/path/to/python3" >&2; exit 1; }; \
	echo "setup: $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { echo "make: $$python cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/.dependencies: requirements/dev.txt $(VENV)/.created
	@echo "setup: installing requirements/dev.txt (once, some minutes)"
	@$(BIN)/python -m pip install $(PIP) --require-hashes -r requirements/dev.txt
	@touch $@

# Again when pyproject.toml changes, because the commands are made from it.
$(VENV)/.installed: pyproject.toml $(VENV)/.dependencies
	@$(BIN)/python -m pip install $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/proto/.installed: requirements/proto.txt $(VENV)/.created
	@echo "setup: installing requirements/proto.txt"
	@$(BIN)/python -m venv --clear $(VENV)/proto
	@$(VENV)/proto/bin/python -m pip install $(PIP) --require-hashes -r requirements/proto.txt
	@touch $@
