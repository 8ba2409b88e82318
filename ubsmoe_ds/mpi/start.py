"""MPI, started before anything else imports it, which would start it as it comes."""

import os
import re
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ubsmoe_ds.launching.launchers import is_task_of_srun

# MPICH tells the others its UCX address in values as long as the process manager allows, depending on what lies behind
# it in memory. Slurm's plugin pmi2 allows 1,024 characters, but reads lines of 1,024, names and all: now and then a job
# would fail or hang at its start.
VALUE_CHARACTERS = 900


def start_mpi(environment: Mapping[str, str]) -> None:
    """Initialise MPI, under `srun --mpi=pmi2` with values that its plugin can read.

    Args:
        environment: of a rank.
    """
    if "PMI_FD" in environment and is_task_of_srun(environment):
        with _short_values(int(environment["PMI_FD"])):
            from mpi4py import MPI
    else:
        from mpi4py import MPI
    assert MPI.Is_initialized()


@contextmanager
def _short_values(descriptor: int) -> Iterator[None]:
    """Stand between MPI and the process manager, which it talks to over this descriptor, and allow shorter values.

    A process does it, because Python's threads cannot run while MPI starts.
    """
    manager = os.dup(descriptor)
    inside, outside = socket.socketpair()
    relay = os.fork()
    if relay == 0:
        try:
            inside.close()
            os.close(descriptor)
            _relay(outside.fileno(), manager)
        finally:
            os._exit(0)
    outside.close()
    os.dup2(inside.fileno(), descriptor)
    inside.close()
    try:
        yield
    finally:
        os.dup2(manager, descriptor)
        os.close(manager)
        os.waitpid(relay, 0)


def _relay(rank: int, manager: int) -> None:
    """Pass on what comes from either side until one of them ends."""
    while True:
        for side in select.select([rank, manager], [], [])[0]:
            said = os.read(side, 2**16)
            if not said:
                return
            if side == manager:
                said = re.sub(rb"(?<=\bvallen_max=)\d+", _shorter, said)
            while said:
                said = said[os.write(rank if side == manager else manager, said) :]


def _shorter(allowed: re.Match[bytes]) -> bytes:
    return str(min(int(allowed[0]), VALUE_CHARACTERS)).encode()
