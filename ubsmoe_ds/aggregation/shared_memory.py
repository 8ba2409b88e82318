"""Memory that the ranks of one host read of each other, so that a merge there needs no messages."""

import os
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ubsmoe_ds.mpi.collectives import move, wait_quietly

SHARED_FOLDER = Path("/dev/shm")  # what POSIX shared memory is made of on Linux; containers often limit it


class SharedMemory:
    """One region a rank, which that rank writes and all read.

    `write`, fill what it returns, `publish`, then `read`; all are collectives but `read`. A region grows when asked to.

    Args:
        comm: of ranks that are all on one host.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self._window: MPI.Win | None = None
        self._capacity = 0

    @classmethod
    def of_job(cls, comm: MPI.Intracomm) -> "SharedMemory | None":
        """For all ranks of a job; None where they are on several hosts (a collective)."""
        wait_quietly(comm.Ibarrier())  # what follows spins until all are there
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        together = host.size == comm.size
        host.Free()
        return cls(comm) if together else None

    def reserve(self, size: int) -> bool:
        """Make every region at least as large as its rank asks, in bytes; what was written before is lost.

        Returns:
            False on every rank, if the host has not enough shared memory for all; nothing is changed then.
        """
        capacity = max(size, self._capacity)
        free = _free_bytes() if self.comm.rank == 0 else 0
        asked = np.array([capacity, capacity > self._capacity, free, self._capacity], dtype=np.int64)
        total, growing, free, held = (int(value) for value in self._sum(asked))
        if not growing:
            return True
        if total > free + held:
            return False
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
        self._capacity = capacity
        self._window = MPI.Win.Allocate_shared(capacity, 1, comm=self.comm)
        self._window.Lock_all()
        self.read(self.comm.rank, torch.uint8).zero_()  # pages are only now taken: if they are short, it shows here
        return True

    def _sum(self, values: np.ndarray) -> np.ndarray:
        total = np.empty_like(values)
        move(self.comm, lambda: self.comm.Iallreduce(values, total))
        return total

    def write(self, numel: int, kind: torch.dtype) -> Tensor:
        """This rank's region, once nobody reads it any more, as `numel` elements to fill."""
        wait_quietly(self.comm.Ibarrier())
        return self.read(self.comm.rank, kind)[:numel]

    def publish(self) -> None:
        """Wait until every rank has filled its region."""
        assert self._window is not None
        self._window.Sync()
        wait_quietly(self.comm.Ibarrier())
        self._window.Sync()

    def read(self, rank: int, kind: torch.dtype) -> Tensor:
        """A rank's region."""
        assert self._window is not None
        buffer, _ = self._window.Shared_query(rank)
        return torch.frombuffer(buffer, dtype=kind) if len(buffer) else torch.empty(0, dtype=kind)


def _free_bytes() -> int:
    """Of shared memory; where it has no folder, no limit is known."""
    if not SHARED_FOLDER.is_dir():
        return 2**62
    found = os.statvfs(SHARED_FOLDER)
    return found.f_bavail * found.f_frsize
