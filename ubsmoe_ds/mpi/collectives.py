"""Wait for MPI without spinning, notice the death of ranks, and gather small facts from all ranks."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

POLL_SECONDS = 0.001  # while waiting for other ranks to arrive
MOVE_SECONDS = 0.00002  # while data moves: each test moves a piece, a longer sleep would starve the transfer
YIELD_SECONDS = 0.0002  # so long others are given the core without sleeping, as a sleep takes 0.07 ms at least
SURVIVES = "OMPI_MCA_mpi_ft_enable"  # set by Open MPI's mpiexec --with-ft ulfm
DEATHS = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


class RanksLost(Exception):  # noqa: N818  # no defect: ulfm.py has what the surviving ranks do then
    """Other ranks of the job have died. Raised only under an MPI that was started to survive deaths."""


def wait_quietly(request: MPI.Request, longest_sleep: float = POLL_SECONDS) -> None:
    """Wait for a request, leaving the core to others: MPICH's own wait burns one that slower clients on the host need.

    It yields at first, then sleeps, the longer the longer it has waited, so that ranks that arrive together go on
    together.

    Raises:
        RanksLost: if a participating rank has died. Keep the exception while you handle it: its traceback keeps
            alive the buffers that MPI may still write to.
    """
    start = time.perf_counter()
    try:
        while not request.Test():
            waited = time.perf_counter() - start
            if waited < YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(min(max(waited / 16, MOVE_SECONDS), longest_sleep))
    except MPI.Exception as error:
        if error.Get_error_class() in DEATHS or _may_be_a_death(error):
            raise RanksLost(str(error)) from error
        raise


def _may_be_a_death(error: MPI.Exception) -> bool:
    """Open MPI reports "other" for a collective that was about to begin its next step when a rank died."""
    return error.Get_error_class() == MPI.ERR_OTHER and os.environ.get(SURVIVES) == "1"


def move(comm: MPI.Comm, start: Callable[[], MPI.Request]) -> None:
    """Wait for every rank of `comm`, then carry out a collective that moves data (a collective).

    Args:
        comm: communicator of the participating ranks.
        start: begins the collective, such as `lambda: comm.Iallreduce(...)`.
    """
    wait_quietly(comm.Ibarrier())
    wait_quietly(start(), MOVE_SECONDS)


def any_true(comm: MPI.Comm, flag: bool) -> bool:
    """Return whether the flag is true on some rank of `comm` (a collective)."""
    mine, largest = np.array([flag], dtype=np.int32), np.zeros(1, dtype=np.int32)
    wait_quietly(comm.Iallreduce(mine, largest, op=MPI.MAX))
    return bool(largest[0])


def gather_json(comm: MPI.Comm, value: Any) -> list[Any]:
    """Gather a small value of every rank on every rank, as JSON (a collective).

    Args:
        comm: communicator of the participating ranks.
        value: what this rank contributes; anything that JSON holds, of any length. Floats arrive bit for bit.

    Returns:
        The values in the order of the ranks, as JSON returns them (a tuple arrives as a list).

    Raises:
        RanksLost: if a participating rank has died.
    """
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    length, lengths = np.array([text.size], dtype=np.int64), np.empty(comm.size, dtype=np.int64)
    move(comm, lambda: comm.Iallgather(length, lengths))
    texts = np.empty(lengths.sum(), dtype=np.uint8)
    wait_quietly(comm.Iallgatherv(text, [texts, lengths]), MOVE_SECONDS)
    return [json.loads(part.tobytes()) for part in np.split(texts, lengths.cumsum()[:-1])]
