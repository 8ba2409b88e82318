"""MPI as ranks start it."""

import subprocess
import sys

from tests.support.ranks import clean_environment

# The first message between two ranks; its sender then waits for the receiver without calling MPI.
FIRST_MESSAGE = """
import os, sys, time
from pathlib import Path
from ubsmoe_ds.mpi.start import start_mpi
start_mpi(os.environ)
from mpi4py import MPI
comm, arrived = MPI.COMM_WORLD, Path(sys.argv[1])
request = comm.Isend(bytearray(8), 1) if comm.rank == 0 else comm.Irecv(bytearray(8), 0)
while not request.Test():
    time.sleep(0.001)
if comm.rank == 1:
    arrived.touch()
deadline = time.monotonic() + 10
while not arrived.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
print("arrived" if arrived.exists() else "left behind", flush=True)
"""


def test_a_first_message_arrives_while_its_sender_waits_elsewhere(tmp_path):
    """As if each rank were on a host of its own, without shared memory. With libfabric the message does not arrive."""
    (tmp_path / "first.py").write_text(FIRST_MESSAGE)
    command = ["mpiexec", "-n", "2", sys.executable, str(tmp_path / "first.py"), str(tmp_path / "arrived")]
    apart = clean_environment() | {"MPIR_CVAR_NOLOCAL": "1"}
    done = subprocess.run(command, env=apart, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split() in (["arrived"] * 2, ["arrivedarrived"]), done
