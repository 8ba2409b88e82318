"""How the ranks of a host end when another is lost, in processes of their own."""

import subprocess
import sys

import pytest

from tests.support.ranks import clean_environment
from ubsmoe_ds.base.errors import EXIT_FAILURE

SECONDS = 30


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a process until it, and all that hold its output, have ended."""
    environment = clean_environment() | environment
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS)


ADDRESSES = """
import os, socket
from ubsmoe_ds.mpi import watchdog
watchdog.all_addresses = lambda: [(name, socket.AF_INET, name) for name in ("ib0", "eth0", "eth1")]
os.environ[watchdog.INTERFACES] = "eth1"  # as `join` does for the group
print(*watchdog._addresses())
"""


@pytest.mark.parametrize(("chosen", "order"), [("", "ib0 eth0 eth1"), ("eth0", "eth0 ib0 eth1")])
def test_what_the_user_chose_for_gloo_is_watched_first(chosen, order):
    assert run(sys.executable, "-c", ADDRESSES, GLOO_SOCKET_IFNAME=chosen).stdout == f"{order}\n"


ENDING = """
import os, subprocess
from ubsmoe_ds.mpi import exits
other = subprocess.Popen(["sleep", "60"])
print("started", flush=True)
exits.abort_job = os._exit  # MPICH's does not come back
pidfds = [os.open(os.devnull, os.O_RDONLY), os.pidfd_open(other.pid)]  # to send to the first is an error
exits.end_host(pidfds, cut_off=True)
"""


def test_on_a_host_that_is_cut_off_the_other_ranks_end_first():
    """Nobody else may be able to end them; a process that is left would hold the output."""
    ended = run(sys.executable, "-c", ENDING)
    assert (ended.stdout, ended.returncode) == ("started\n", EXIT_FAILURE)


def test_a_container_between_does_not_hide_open_mpi(tmp_path):
    shown = f"{sys.executable} -c 'from ubsmoe_ds.mpi import exits; print(exits.open_mpi_daemon())'"
    daemon, starter = tmp_path / "prted", tmp_path / "starter"
    for script, command in ((daemon, f"echo $$; {starter}"), (starter, shown)):
        script.write_text(f"#!/bin/sh\n{command}\ntrue\n")  # the shell has more to do, so it stays
        script.chmod(0o755)
    pid, reported = run(str(daemon)).stdout.split()
    assert reported == pid
    assert run(str(starter)).stdout == "None\n"
