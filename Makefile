# Two commands for users, `make demo` and `make test`; both set up what they need in $(VENV).
#
#   make demo                     watch the main job learn, be killed and resume (a few minutes)
#   make test                     the whole test-suite (GPU tests skip where there is no GPU)
#   make check                    what CI holds a change to: format, lint, types, floors, tests
#   make test TESTS=tests/data    a part of it
#   make audit                    secrets in the files, known faults of what the image installs
#
# PYTHON=/path/to/python3.11 chooses the interpreter, VENV=folder the environment.

VENV ?= .venv
TESTS ?=
# Files of tests side by side; BESIDE=1 runs one after the other, as `pytest` alone does.
BESIDE ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(BESIDE) --dist loadfile --no-loadscope-reorder
CODE := models data training pretrain finetune cluster tests $(wildcard querypatch.py setup.py benchmarks)

# A name on the PATH proves nothing (version managers install shims that refuse to run), so each is tried.
WORKS := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(shell $(name) $(WORKS) && echo $(name))))

INSTALLED := $(VENV)/.installed

.PHONY: demo test check audit format setup clean

demo: setup
	$(VENV)/bin/querypatch demo

test: setup
	$(PYTEST) $(TESTS)

check: setup
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTEST) $(TESTS)

audit: setup
	$(VENV)/bin/python .ci/scan.py

format: setup
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

setup: $(INSTALLED)

# The stamp is older than these only when the dependencies or the operator library may have changed.
$(INSTALLED): pyproject.toml setup.py $(wildcard models/ops/csrc/*)
	@$(if $(PYTHON),,echo "no Python 3.11 or later with venv found: install python3.12 \
	(Debian: python3.12-venv too) or say PYTHON=/path/to/python3.12" >&2; exit 1)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info querypatch_ops*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
