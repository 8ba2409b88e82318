"""`World`: a rank's place in the job, in its group and on its host, and the collectives that a round needs."""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.mpi.collectives import MOVE_SECONDS, RanksLost, any_true, move, wait_quietly

GATHERED_BYTES = 2**20  # of all ranks together, up to which each rank sums for itself
STAGE_DONE, RECOVERING = 0b01, 0b10  # what ranks agree on; both meet in the same agreements


@dataclass(frozen=True)
class World:
    """One rank's view of the job; `join` makes it.

    A group is the DeepSpeed world (ranks, expert parallelism, ZeRO) that trains clients: its own, or several in turn.
    """

    comm: MPI.Intracomm  # all ranks of the job
    group_comm: MPI.Comm  # ranks of this rank's group
    group_of: tuple[int, ...]  # number of each rank's group
    group: int  # number of this rank's group; where each client has its own group, also that client's
    group_rank: int  # rank in the group
    hosts: tuple[str, ...]  # host name of each rank
    meetings: tuple[str, ...]  # where each group's ranks meet if they are on several hosts, else ""
    host_comm: MPI.Comm  # ranks on this host
    cores: int  # this rank's share of the cores that it may run on, at least 1
    survives: bool = False  # whether the job goes on when ranks die

    @property
    def rank(self) -> int:
        """Rank in the whole job."""
        return self.comm.rank

    @property
    def group_hosts(self) -> list[list[str]]:
        """Host names of each group's ranks."""
        hosts: list[list[str]] = [[] for _ in range(max(self.group_of) + 1)]
        for group, host in zip(self.group_of, self.hosts, strict=True):
            hosts[group].append(host)
        return hosts

    def barrier(self) -> None:
        """Wait for every rank, leaving the cores to those that still work (a collective)."""
        wait_quietly(self.comm.Ibarrier())

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 arrays over all ranks, the same bits on every rank (a collective)."""
        return _sum(self.comm, values)

    def sum_of_group(self, values: np.ndarray) -> np.ndarray:
        """Do the same over the ranks of this group (a collective over the group)."""
        return np.asarray(values, dtype=np.float64) if self.group_comm.size == 1 else _sum(self.group_comm, values)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on some rank of the job (a collective)."""
        return any_true(self.comm, flag)

    def any_of_group(self, flag: bool) -> bool:
        """Return whether the flag is true on some rank of this group (a collective over the group)."""
        return flag if self.group_comm.size == 1 else any_true(self.group_comm, flag)

    def agree(self) -> None:
        """Separate what may be done again from what may not: go on only if all ranks got here (a collective).

        Raises:
            RanksLost: on every remaining rank, if a rank has died before all were here.
        """
        if self.survives:
            word = np.array([STAGE_DONE], dtype=np.int32)  # AND over all ranks; 0 if one is already recovering
            wait_quietly(self.comm.Iagree(word))
            if word[0] != STAGE_DONE:
                raise RanksLost("another rank has seen a death")


def _sum(comm: MPI.Comm, values: np.ndarray) -> np.ndarray:
    mine = np.ascontiguousarray(values, dtype=np.float64)
    if mine.nbytes * comm.size <= GATHERED_BYTES:  # one step among ranks, where the sums below take four or more
        everybody = np.empty((comm.size, *mine.shape))
        wait_quietly(comm.Iallgather(mine, everybody))
        return np.add.reduce(everybody)
    total = np.zeros_like(mine)
    move(comm, lambda: comm.Iallreduce(mine, total))
    # ranks may sum in different orders; rank 0's result is everybody's
    wait_quietly(comm.Ibcast(total, root=0), MOVE_SECONDS)
    return total
