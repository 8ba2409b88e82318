# Fresh machine: Python 3.11+, git, make. No compiler, no sudo, no accelerator.
#   make demo   set-up, then the main job (at most 3 minutes on 2 cores)
#   make test   set-up, then the whole test suite
#   make check  lint, types and the fast tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check setup clean
demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/train.py

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

setup: $(VENV)/installed

# torch first and alone: any looser request would fetch another build with gigabytes of CUDA
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
