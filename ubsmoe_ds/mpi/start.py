"""Start MPI, before anything else imports mpi4py, which would start it without the settings made here."""

import os
import re
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ubsmoe_ds.launching.launchers import is_task_of_srun

# MPICH sends its UCX address to the other ranks in values as long as the process manager allows; how long they get
# depends on what lies behind the address in memory. Slurm's plugin pmi2 allows 1,024 characters, but reads lines of
# 1,024, names included: now and then a job would fail or hang at its start.
VALUE_CHARACTERS = 900


def start_mpi(environment: Mapping[str, str]) -> None:
    """Initialise MPI; under `srun --mpi=pmi2` with values that its plugin can read.

    Args:
        environment: the rank's.
    """
    if "PMI_FD" in environment and is_task_of_srun(environment):
        with _short_values(int(environment["PMI_FD"])):
            from mpi4py import MPI
    else:
        from mpi4py import MPI
    assert MPI.Is_initialized()


@contextmanager
def _short_values(descriptor: int) -> Iterator[None]:
    """Relay between MPI and the process manager, which talk over this descriptor, and allow shorter values.

    A forked process relays, because Python's threads cannot run while MPI starts.
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
    """Pass on what either side sends until one of them ends.

    Args:
        rank, manager: file descriptors.
    """
    while True:
        for side in select.select([rank, manager], [], [])[0]:
            message = os.read(side, 2**16)
            if not message:
                return
            if side == manager:
                message = re.sub(rb"(?<=\bvallen_max=)\d+", _shorter, message)
            while message:
                message = message[os.write(rank if side == manager else manager, message) :]


def _shorter(allowed: re.Match[bytes]) -> bytes:
    """Return the length to allow in place of the one that the manager allows."""
    return str(min(int(allowed[0]), VALUE_CHARACTERS)).encode()
