"""Commands that are started by a Python without the package or its dependencies."""

import subprocess
import sys

import pytest

from tests.support.ranks import REPO

COMMANDS = sorted(path.name for path in (REPO / "launch").glob("[a-z]*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_in_one_line_what_its_python_lacks(command):
    """`-S` leaves out installed packages and `-E` PYTHONPATH, as in an empty environment."""
    bare = [sys.executable, "-E", "-S", str(REPO / "launch" / command)]
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: ubsmoe_ds, torch, deepspeed, mpi4py are not installed in this Python (")
    assert line.endswith("run `make setup`, then `source .venv/bin/activate`")


def test_no_command_is_left_out():
    assert {"train.py", "plan.py", "compare.py"} < set(COMMANDS)
