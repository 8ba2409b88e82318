"""Units <-> owners over MPI, without a central server and without arithmetic.

A unit is one module's trainable state. A fixed map spreads the units over all ranks by bytes; the rank that a unit is
assigned to is its owner. In a round the holders of a unit (one per client) send their update to its owner, the owner
calls the merge with the stack of all clients' updates, and sends the result to every rank that holds the unit. Both
ways are one Alltoallv of contiguous fp32. Clients may differ in ranks and expert parallelism: experts are re-sharded
on the way. Every rank derives all counts from the config, so nothing but the payload is sent.

Shapes: C clients, N elements of the units of one owner.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.world import wait_quietly


@dataclass(frozen=True)
class Unit:
    """`expert` is the expert it belongs to, or None for state that every rank of a client holds."""

    name: str
    numel: int
    expert: int | None = None


@dataclass(frozen=True)
class ClientLayout:
    """Which ranks of the job a client has, and how its experts are spread over them (DeepSpeed's order)."""

    first: int
    ranks: int
    expert_parallel: int

    def holders(self, unit: Unit, num_experts: int) -> range:
        """Job ranks that hold the unit: all of the client, or those of its expert's place in each expert group."""
        if unit.expert is None:
            return range(self.first, self.first + self.ranks)
        place = unit.expert // (num_experts // self.expert_parallel)
        return range(self.first + place, self.first + self.ranks, self.expert_parallel)


MergeOwned = Callable[[range, np.ndarray], np.ndarray]  # (positions of the owned units, update_CN) -> merged_N


class Seconds(NamedTuple):
    """Of one exchange on this rank."""

    moving: float
    merging: float


Run = tuple[int, int, int]  # source start, destination start, length


class Exchange:
    """The plan of one rank, made once; `merge` carries it out.

    Args:
        comm: the job's communicator.
        layouts: of all clients, in the order of the merge's C axis.
        units: of the whole model, the same list on every rank.
        num_experts: experts of the model.
    """

    def __init__(
        self, comm: MPI.Intracomm, layouts: Sequence[ClientLayout], units: Sequence[Unit], num_experts: int
    ) -> None:
        self.comm, self.units = comm, units
        owner = owners(units, comm.size)
        self.owned = range(*np.searchsorted(owner, [comm.rank, comm.rank + 1]).tolist())
        sizes = np.array([unit.numel for unit in units], dtype=np.int64)
        holders = [[layout.holders(unit, num_experts) for unit in units] for layout in layouts]
        mine = [index for index in range(len(units)) if any(comm.rank in per_unit[index] for per_unit in holders)]
        self.held_numel = int(sizes[mine].sum()) if mine else 0
        # to the owners: of a client's replicas one sends, a different one for each unit in turn
        senders = [[ranks[i % len(ranks)] for i, ranks in enumerate(per_unit)] for per_unit in holders]
        sent = [index for index in mine if any(per_unit[index] == comm.rank for per_unit in senders)]
        start_held = _starts(mine, sizes)
        self._pack: list[Run] = _coalesce(
            [(start_held[i], start, int(sizes[i])) for i, start in _starts(sent, sizes).items()]
        )
        self._up_send = np.bincount(owner[sent], sizes[sent], comm.size).astype(np.int64)
        self._stack_shape = (len(layouts), int(sizes[self.owned].sum()))
        self._unpack, self._up_receive = self._plan_receive(senders, sizes)
        # back to all holders, in unit order, which is the order of the held buffer
        self._reply, self._down_send = self._plan_reply(holders, sizes)
        self._down_receive = np.bincount(owner[mine], sizes[mine], comm.size).astype(np.int64)
        sent_elements = self._up_send + self._down_send
        self.bytes_sent = 4 * int(sent_elements.sum() - sent_elements[comm.rank])  # to other ranks, in one exchange

    def merge(self, held: np.ndarray, merge_owned: MergeOwned) -> tuple[np.ndarray, Seconds]:
        """Exchange and merge one round's updates (a collective over the job).

        Args:
            held: fp32, the updates of the units that this rank holds, in unit order, concatenated.
            merge_owned: see `MergeOwned`; called once, also where this rank owns nothing.

        Returns:
            (fp32, the merged values of the same units in the same order, seconds spent).
        """
        if held.shape != (self.held_numel,) or held.dtype != np.float32:
            raise ValueError(f"held must be float32 of {self.held_numel} elements, got {held.dtype} {held.shape}")
        start = time.perf_counter()
        send = _copy(held, self._pack, int(self._up_send.sum()))
        received = self._alltoallv(send, self._up_send, self._up_receive)
        stack_CN = _copy(received, self._unpack, int(np.prod(self._stack_shape))).reshape(self._stack_shape)
        moved = time.perf_counter()
        merged = np.ascontiguousarray(merge_owned(self.owned, stack_CN), dtype=np.float32)
        done = time.perf_counter()
        if merged.shape != (self._stack_shape[1],):
            raise ValueError(f"the merge must return {self._stack_shape[1]} elements, got shape {merged.shape}")
        reply = _copy(merged, self._reply, int(self._down_send.sum()))
        result = self._alltoallv(reply, self._down_send, self._down_receive)
        return result, Seconds(moved - start + time.perf_counter() - done, done - moved)

    def _alltoallv(self, send: np.ndarray, send_counts: np.ndarray, receive_counts: np.ndarray) -> np.ndarray:
        received = np.empty(int(receive_counts.sum()), dtype=np.float32)
        wait_quietly(self.comm.Ialltoallv([send, send_counts, MPI.FLOAT], [received, receive_counts, MPI.FLOAT]))
        return received

    def _plan_receive(self, senders: list[list[int]], sizes: np.ndarray) -> tuple[list[Run], np.ndarray]:
        """Where each piece that arrives belongs in the [C, N] stack; pieces arrive by sender, then by unit."""
        pieces = []
        for client, per_unit in enumerate(senders):
            start = client * self._stack_shape[1]
            for index in self.owned:
                pieces.append((per_unit[index], index, start, int(sizes[index])))
                start += int(sizes[index])
        pieces.sort()
        counts = np.zeros(self.comm.size, dtype=np.int64)
        runs, arrived = [], 0
        for sender, _, start, length in pieces:
            runs.append((arrived, start, length))
            arrived += length
            counts[sender] += length
        return _coalesce(runs), counts

    def _plan_reply(self, holders: list[list[range]], sizes: np.ndarray) -> tuple[list[Run], np.ndarray]:
        """Owned units for each rank that holds them, by rank, then by unit."""
        start_owned = _starts(self.owned, sizes)
        pieces = sorted((rank, index) for per_unit in holders for index in self.owned for rank in per_unit[index])
        counts = np.zeros(self.comm.size, dtype=np.int64)
        runs, sent = [], 0
        for rank, index in pieces:
            length = int(sizes[index])
            runs.append((start_owned[index], sent, length))
            sent += length
            counts[rank] += length
        return _coalesce(runs), counts


def owners(units: Sequence[Unit], ranks: int) -> np.ndarray:
    """Owner of each unit: contiguous blocks of units with about equal bytes; the same on every rank."""
    sizes = np.array([unit.numel for unit in units], dtype=np.float64)
    middle = np.cumsum(sizes) - sizes / 2
    return np.minimum((middle / sizes.sum() * ranks).astype(np.int64), ranks - 1)


def _starts(indices: Sequence[int], sizes: np.ndarray) -> dict[int, int]:
    """Offset of each unit in a buffer that holds the given units one after the other."""
    offset, found = 0, {}
    for index in indices:
        found[index] = offset
        offset += int(sizes[index])
    return found


def _coalesce(runs: list[Run]) -> list[Run]:
    """Join runs that follow each other in both buffers: few large copies instead of one per unit."""
    joined: list[Run] = []
    for source, destination, length in runs:
        if joined and joined[-1][0] + joined[-1][2] == source and joined[-1][1] + joined[-1][2] == destination:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + length)
        else:
            joined.append((source, destination, length))
    return joined


def _copy(source: np.ndarray, runs: list[Run], numel: int) -> np.ndarray:
    """A buffer of `numel` elements filled by the runs; the source itself where they change nothing."""
    if numel == len(source) and runs == [(0, 0, numel)]:
        return source
    result = np.empty(numel, dtype=source.dtype)
    for start, destination, length in runs:
        result[destination : destination + length] = source[start : start + length]
    return result
