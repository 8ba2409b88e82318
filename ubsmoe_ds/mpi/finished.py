"""Count the turns that all groups together have finished in a round, while they train; nobody waits for the count."""

from collections import Counter

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.mpi.collectives import MOVE_SECONDS, wait_quietly
from ubsmoe_ds.mpi.world import World


class FinishedTurns:
    """The first rank of each group tells the first ranks of all others when a client of its group has finished.

    Args:
        world: this rank's place in the job; its communicator is duplicated (a collective).
        number: the current round. finished: turns of it that a checkpoint holds.
    """

    def __init__(self, world: World, number: int = 0, finished: int = 0) -> None:
        self.comm = world.comm.Dup()
        firsts = [world.group_of.index(group) for group in range(max(world.group_of) + 1)]
        self.others = [rank for rank in firsts if rank != world.rank] if world.group_rank == 0 else []
        self.counts: Counter[int] = Counter({number: finished})
        self._message = np.zeros(1, dtype=np.int64)
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []  # a buffer must live as long as its message

    def tell(self, number: int) -> None:
        """Note that a client of this group has finished its turn of a round, and tell the other groups."""
        self.counts[number] += 1
        message = np.array([number], dtype=np.int64)
        self._sent += [(self.comm.Isend(message, dest=rank), message) for rank in self.others]

    def count(self, number: int) -> int:
        """Return how many turns of a round are known to have finished; of use on the first rank of a group alone."""
        while self.comm.Iprobe(source=MPI.ANY_SOURCE):
            self.comm.Recv(self._message, source=MPI.ANY_SOURCE)
            self.counts[int(self._message[0])] += 1
        return self.counts[number]

    def settle(self, number: int, finished: int) -> None:
        """Receive what is still on its way of a round that is over, so that no message is left when MPI ends.

        Args:
            number: the round.
            finished: turns that have finished in it.
        """
        while self.others and self.count(number) < finished:
            wait_quietly(self.comm.Irecv(self._message, source=MPI.ANY_SOURCE), MOVE_SECONDS)
            self.counts[int(self._message[0])] += 1
        for request, _ in self._sent:
            wait_quietly(request, MOVE_SECONDS)
        self._sent.clear()
