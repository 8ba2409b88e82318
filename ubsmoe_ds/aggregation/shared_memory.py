"""Share memory between the ranks of one host, so that they read each other's data and send no messages.

Shapes: R ranks.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ubsmoe_ds.mpi.collectives import move, wait_quietly

ALIGNMENT = 64  # bytes: a line of the cache
SHARED_FOLDER = Path("/dev/shm")  # holds POSIX shared memory on Linux; containers often limit it


class SharedMemory:
    """One region per rank, which that rank writes and all ranks read, with two rooms: one for each way of an exchange.

    In order: `write`, fill the tensor that it returns, `publish`, `read`. `write` and `publish` are collectives.
    `reserve` makes the rooms larger.

    Args:
        comm: communicator of ranks that are all on one host.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self._window: MPI.Win | None = None
        # bytes from which rooms begin in the ranks' regions, last the end
        self._start_R3 = np.zeros((comm.size, 3), dtype=np.int64)
        self._latest = -1  # room written to last
        self._tensors: dict[tuple[int, int, torch.dtype], Tensor] = {}  # see `read`

    @classmethod
    def of_job(cls, comm: MPI.Intracomm) -> "SharedMemory | None":
        """Return memory for all ranks of a job; None where they are on several hosts (a collective)."""
        wait_quietly(comm.Ibarrier())  # Split_type busy-waits until all ranks are there
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        together = host.size == comm.size
        host.Free()
        return cls(comm) if together else None

    def reserve(self, sizes: Sequence[int]) -> bool:
        """Make this rank's rooms at least `sizes` bytes; what was written before is lost (a collective).

        Returns:
            False on every rank if the host has too little shared memory for all regions; they then stay as they are.
        """
        held_R3, free = self._start_R3, _free_bytes() if self.comm.rank == 0 else 0
        capacities = np.maximum(-(-np.array(sizes) // ALIGNMENT) * ALIGNMENT, np.diff(held_R3[self.comm.rank]))
        table_R3 = self._gather(np.array([*capacities, free], dtype=np.int64))
        start_R3, free = np.pad(table_R3[:, :2].cumsum(axis=1), ((0, 0), (1, 0))), int(table_R3[:, 2].sum())
        if (start_R3 == held_R3).all():
            return True
        if start_R3[:, -1].sum() > free + held_R3[:, -1].sum():
            return False
        if self._window is not None:
            self._tensors.clear()
            self._window.Unlock_all()
            self._window.Free()
        self._start_R3, self._latest = start_R3, -1
        self._window = MPI.Win.Allocate_shared(int(start_R3[self.comm.rank, -1]), 1, comm=self.comm)
        self._window.Lock_all()
        for room in range(2):
            self.read(room, self.comm.rank, torch.uint8).zero_()  # takes the pages now: a shortage shows here
        return True

    def _gather(self, values: np.ndarray) -> np.ndarray:
        """Return the values of every rank (a collective)."""
        everybody = np.empty((self.comm.size, *values.shape), dtype=values.dtype)
        move(self.comm, lambda: self.comm.Iallgather(values, everybody))
        return everybody

    def write(self, room: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Wait until nobody reads this rank's room; return `numel` elements of it to fill (a collective).

        All who read a room have come through the `publish` of the other one, if that was written to since.
        """
        if room == self._latest:
            wait_quietly(self.comm.Ibarrier())
        self._latest = room
        return self.read(room, self.comm.rank, dtype)[:numel]

    def publish(self) -> None:
        """Wait until every rank has filled its room (a collective)."""
        assert self._window is not None
        self._window.Sync()
        wait_quietly(self.comm.Ibarrier())
        self._window.Sync()

    def read(self, room: int, rank: int, dtype: torch.dtype) -> Tensor:
        """Return a rank's room as a tensor."""
        key = room, rank, dtype
        if key not in self._tensors:
            assert self._window is not None
            buffer, _ = self._window.Shared_query(rank)
            start, end = self._start_R3[rank, room : room + 2].tolist()
            count = (end - start) // dtype.itemsize
            empty = torch.empty(0, dtype=dtype)
            self._tensors[key] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start) if count else empty
        return self._tensors[key]


def _free_bytes() -> int:
    """Return the free bytes of shared memory; without its folder no limit is known, and the figure is 2^62."""
    if not SHARED_FOLDER.is_dir():
        return 2**62
    status = os.statvfs(SHARED_FOLDER)
    return status.f_bavail * status.f_frsize
