"""Share memory between the ranks of one host, so that they read each other's data and send no messages."""

import os
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ubsmoe_ds.mpi.collectives import move, wait_quietly

SHARED_FOLDER = Path("/dev/shm")  # holds POSIX shared memory on Linux; containers often limit it


class SharedMemory:
    """One region per rank, which that rank writes and all ranks read.

    In order: `write`, fill the tensor that it returns, `publish`, `read`. `write` and `publish` are collectives.
    `reserve` makes the regions larger.

    Args:
        comm: communicator of ranks that are all on one host.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self._window: MPI.Win | None = None
        self._capacity = 0

    @classmethod
    def of_job(cls, comm: MPI.Intracomm) -> "SharedMemory | None":
        """Return memory for all ranks of a job; None where they are on several hosts (a collective)."""
        wait_quietly(comm.Ibarrier())  # Split_type busy-waits until all ranks are there
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        together = host.size == comm.size
        host.Free()
        return cls(comm) if together else None

    def reserve(self, size: int) -> bool:
        """Make this rank's region at least `size` bytes; what was written before is lost (a collective).

        Returns:
            False on every rank if the host has too little shared memory for all regions; they then stay as they are.
        """
        capacity = max(size, self._capacity)
        free = _free_bytes() if self.comm.rank == 0 else 0
        local = np.array([capacity, capacity > self._capacity, free, self._capacity], dtype=np.int64)
        total, growing, free, held = (int(value) for value in self._sum(local))
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
        self.read(self.comm.rank, torch.uint8).zero_()  # takes the pages now: a shortage shows here
        return True

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the ranks (a collective)."""
        total = np.empty_like(values)
        move(self.comm, lambda: self.comm.Iallreduce(values, total))
        return total

    def write(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Wait until nobody reads this rank's region; return `numel` elements of it to fill (a collective)."""
        wait_quietly(self.comm.Ibarrier())
        return self.read(self.comm.rank, dtype)[:numel]

    def publish(self) -> None:
        """Wait until every rank has filled its region (a collective)."""
        assert self._window is not None
        self._window.Sync()
        wait_quietly(self.comm.Ibarrier())
        self._window.Sync()

    def read(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Return a rank's region as a tensor."""
        assert self._window is not None
        buffer, _ = self._window.Shared_query(rank)
        return torch.frombuffer(buffer, dtype=dtype) if len(buffer) else torch.empty(0, dtype=dtype)


def _free_bytes() -> int:
    """Return the free bytes of shared memory; without its folder no limit is known, and the figure is 2^62."""
    if not SHARED_FOLDER.is_dir():
        return 2**62
    status = os.statvfs(SHARED_FOLDER)
    return status.f_bavail * status.f_frsize
