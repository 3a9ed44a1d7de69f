# Every target works alone on a fresh clone: what it needs is installed into .venv first.
#
# Versions come from constraints.txt, so torch is the tested release. On Linux the package index serves its CUDA build;
# on a machine without a GPU, point pip at PyTorch's CPU index for the small one: PIP_EXTRA_INDEX_URL=... make demo

PYTHON ?= python3
# Silent where nobody watches; at a terminal pip shows its progress.
PIP_FLAGS ?= $(shell test -t 2 || echo -qq)
ARGS ?=
# Files that begin with an underscore are helpers of the benchmarks.
BENCH ?= $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

VENV := .venv
BIN := $(VENV)/bin
# One environment, three stamps: the demo does not wait for the developer tools, nor do these for the site's.
DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed
SITE := $(VENV)/.docs-installed
INPUTS := pyproject.toml constraints.txt awq_core/_version.py
NEEDED := (3, 11)
# Writes what of docs/ is made from the code.
DOCS_COMMAND := $(BIN)/awq matrix && $(BIN)/python tests/matrix/regenerate.py && $(BIN)/python docs/make

define make-venv
$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= $(NEEDED) else "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])' \
	&& $(PYTHON) -m venv $(VENV)
endef

define install
	@test -x $(BIN)/pip || { $(make-venv); }
	@echo "installing awq-core[$(1)] into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c constraints.txt -e '.[$(1)]' \
		|| { echo "pip failed: run the same target with PIP_FLAGS= to see all that it says" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format typecheck bench docs docs-site clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(DEV) ## build .venv with awq-core (editable) and the developer tools
	@echo "$(VENV) is ready: $(BIN)/awq --help"

demo: $(DEMO) ## quantize a small language model, load it and let it answer
	@$(BIN)/awq demo $(ARGS)

test: $(DEV) ## run the tests; ARGS="tests/unit -k layout" narrows them
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## check style and formatting (ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV) ## repair style and formatting (ruff)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(DEV) ## check types (mypy --strict)
	@$(BIN)/mypy

bench: $(DEMO) ## run the benchmarks; BENCH=benchmarks/one.py picks one
	@set -e; for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

docs: $(DEMO) ## regenerate the documents that are made from the code
	@$(DOCS_COMMAND)

docs-site: $(SITE) ## build the documentation site into build/site (mkdocs; warnings are errors)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

clean: ## remove caches and built files; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find awq_core backends fusers docs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO): $(INPUTS)
	$(call install,demo)
	@touch $@

$(SITE): $(INPUTS)
	$(call install,docs)
	@touch $(DEMO) $@

# dev holds all that demo does.
$(DEV): $(INPUTS)
	$(call install,dev)
	@touch $(DEMO) $@
