"""Units <-> owners over MPI, without a central server and without arithmetic.

A unit is one module's trainable state. A fixed map spreads the units over all ranks by bytes; the rank that a unit is
assigned to is its owner. In a round the holders of a unit (one per client) send their update to its owner (`collect`),
the owner merges what all clients sent, and sends each client's result to every rank of it that holds the unit
(`distribute`). Both ways are one Alltoallv of contiguous fp32 or bf16; where all ranks are on one host they read it
from each other's memory instead. Clients may differ in ranks, in expert
parallelism (experts are re-sharded on the way) and in LoRA rank, which decides how many elements a unit has for them.
Every rank derives all counts from the layouts, so nothing but the payload is sent.

Shapes: C clients, N elements of the units of one owner, as one client sends or receives them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from mpi4py import MPI

from ubsmoe_ds.aggregation.layout import ClientLayout, Unit
from ubsmoe_ds.aggregation.shared_memory import SharedMemory
from ubsmoe_ds.mpi.collectives import move

SUM_PIECE = 2**16  # elements


class Span(NamedTuple):
    """`length` elements from `start` of buffer number `source` to `destination` of the buffer that is filled."""

    source: int
    start: int
    destination: int
    length: int


@dataclass
class _Way:
    """One direction as one rank sees it: how to fill what it sends, and how to spread out what arrives.

    peer_starts: where, in what each rank sends, the part for this rank begins
    """

    pack: list[Span]
    send_counts: np.ndarray
    receive_counts: np.ndarray
    unpack: list[Span]
    result_sizes: list[int]  # of the buffers that `unpack` fills, one after the other
    peer_starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.peer_starts = np.empty_like(self.send_counts)

    @property
    def numel(self) -> int:
        """Elements that this rank sends."""
        return int(self.send_counts.sum())

    @cached_property
    def read(self) -> list[Span]:
        """`unpack` with what each rank sends as its sources."""
        ends = np.cumsum(self.receive_counts)
        return [
            Span(peer, int(self.peer_starts[peer]) + piece.start - first, piece.destination, piece.length)
            for peer, first, piece in _cut(self.unpack, ends)
        ]


class Exchange:
    """The plan of one rank for given layouts.

    Args:
        comm: the job's communicator.
        layouts: of all clients, in the order of the merge's C axis.
        units: of the whole model, the same list on every rank.
        num_experts: experts of the model.
        owner: see `owners`; it stays the same when LoRA ranks change.
        payload: "fp32" or "bf16".
        memory: what the ranks share if they are all on one host; None: they send messages.
        same_back: whether all clients get the same back, as under rules on elements; on one host it is written once.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layouts: Sequence[ClientLayout],
        units: Sequence[Unit],
        num_experts: int,
        owner: np.ndarray,
        payload: str = "fp32",
        memory: SharedMemory | None = None,
        same_back: bool = False,
    ) -> None:
        self.comm, self.units, self.layouts = comm, units, layouts
        self.payload, self.num_experts, self.same_back = payload, num_experts, same_back
        self.owned = range(*np.searchsorted(owner, [comm.rank, comm.rank + 1]).tolist())
        client = max(c for c, layout in enumerate(layouts) if layout.first <= comm.rank)
        holders = [[layout.holders(unit, num_experts) for unit in units] for layout in layouts]
        mine = [index for index, ranks in enumerate(holders[client]) if comm.rank in ranks]
        # to the owners: of a client's replicas one sends, a different one for each unit in turn
        senders = [[ranks[i % len(ranks)] for i, ranks in enumerate(per_unit)] for per_unit in holders]
        self._up = self._plan_up(client, mine, senders, owner)
        self._down = self._plan_down(client, mine, holders, owner)
        self._from_owners = self._plan_reading(client, mine, owner)
        self.memory = None if memory is None else self._share(memory)
        self.held_numel = int(layouts[client].sizes(units, reply=False)[mine].sum())
        sent = self._up.send_counts + self._down.send_counts
        width = 2 if payload == "bf16" else 4
        self.bytes_sent = width * int(sent.sum() - sent[comm.rank])  # to other ranks, in one round

    def collect(self, held: np.ndarray, exact: bool = False) -> list[np.ndarray]:
        """Every client's values of the units that this rank owns (a collective over the job).

        Args:
            held: fp32, the units that this rank holds, in unit order, concatenated.
            exact: send fp32 whatever the payload.

        Returns:
            One fp32 array a client, the owned units in order.
        """
        if held.shape != (self.held_numel,) or held.dtype != np.float32:
            raise ValueError(f"held must be float32 of {self.held_numel} elements, got {held.dtype} {held.shape}")
        return self._travel([held], self._up, exact)

    def distribute(self, replies: Sequence[np.ndarray]) -> np.ndarray:
        """Send each client its values of the owned units (a collective over the job).

        Args:
            replies: fp32, one array a client, all the same one where `same_back`.

        Returns:
            fp32, the units that this rank holds, in unit order, concatenated.
        """
        need = [int(layout.sizes(self.units, reply=True)[self.owned].sum()) for layout in self.layouts]
        if [reply.shape for reply in replies] != [(numel,) for numel in need]:
            raise ValueError(f"replies must have {need} elements, got shapes {[reply.shape for reply in replies]}")
        if self.same_back and any(reply is not replies[0] for reply in replies):
            raise ValueError("replies must be one and the same array")
        if self.same_back and self.memory is not None:
            return self._read_owners(replies[0])
        return self._travel(replies, self._down, exact=False)[0]

    @property
    def is_reducible(self) -> bool:
        """Whether every client is one rank and holds the same: then MPI can form sums on the way."""
        alike = all((layout.ranks, layout.lora_rank) == (1, self.layouts[0].lora_rank) for layout in self.layouts)
        return alike and self.payload == "fp32"

    def reduce(self, held: np.ndarray, share: np.ndarray | float) -> np.ndarray:
        """The sum over clients of the units that this rank owns (a collective over the job).

        Args:
            held: fp32, as in `collect`.
            share: what the client's elements are multiplied with first, one number or one an element.
        """
        counts = self._up.send_counts
        total = np.empty(int(counts[self.comm.rank]), dtype=np.float32)
        if self.memory is not None:
            np.multiply(held, np.float32(share), out=self.memory.write(len(held), torch.float32).numpy())
            self.memory.publish()
            start = int(counts[: self.comm.rank].sum())
            parts = [self.memory.read(rank, torch.float32)[start : start + len(total)] for rank in range(len(counts))]
            _sum_into(torch.from_numpy(total), parts)
            return total
        scaled = held * np.float32(share)
        move(
            self.comm,
            lambda: self.comm.Ireduce_scatter([scaled, MPI.FLOAT], [total, MPI.FLOAT], counts.tolist(), op=MPI.SUM),
        )
        return total

    def gather(self, owned: np.ndarray) -> np.ndarray:
        """What every owner has for its units, in unit order, on every rank (a collective over the job)."""
        if self.memory is not None:
            return self._read_owners(owned)
        counts = self._up.send_counts
        whole = np.empty(int(counts.sum()), dtype=np.float32)
        move(self.comm, lambda: self.comm.Iallgatherv([owned, MPI.FLOAT], [whole, counts, MPI.FLOAT]))
        return whole

    def _read_owners(self, owned: np.ndarray) -> np.ndarray:
        """What every owner has for its units, as far as this rank holds them, through the host's memory."""
        assert self.memory is not None
        kind = torch.bfloat16 if self.payload == "bf16" else torch.float32
        self.memory.write(len(owned), kind).copy_(torch.from_numpy(owned))
        self.memory.publish()
        held = np.empty(sum(run.length for run in self._from_owners), dtype=np.float32)
        peers = [self.memory.read(rank, kind) for rank in range(self.comm.size)]
        _copy(peers, self._from_owners, torch.from_numpy(held))
        return held

    def _travel(self, sources: Sequence[np.ndarray], way: _Way, exact: bool) -> list[np.ndarray]:
        if self.memory is not None:
            kind = torch.bfloat16 if self.payload == "bf16" and not exact else torch.float32
            _copy([torch.from_numpy(source) for source in sources], way.pack, self.memory.write(way.numel, kind))
            self.memory.publish()
            flat = np.empty(sum(way.result_sizes), dtype=np.float32)
            peers = [self.memory.read(rank, kind) for rank in range(self.comm.size)]
            _copy(peers, way.read, torch.from_numpy(flat))
            return np.split(flat, np.cumsum(way.result_sizes)[:-1])
        send = _fill(sources, way.pack, int(way.send_counts.sum()))
        if self.payload == "bf16" and not exact:
            bits = torch.from_numpy(send).bfloat16().view(torch.uint16).numpy()
            arrived = self._alltoallv(bits, way, MPI.UINT16_T)  # MPI knows no bfloat16
            received = torch.from_numpy(arrived).view(torch.bfloat16).float().numpy()
        else:
            received = self._alltoallv(send, way, MPI.FLOAT)
        flat = _fill([received], way.unpack, sum(way.result_sizes))
        return np.split(flat, np.cumsum(way.result_sizes)[:-1])

    def _alltoallv(self, send: np.ndarray, way: _Way, kind: MPI.Datatype) -> np.ndarray:
        received = np.empty(int(way.receive_counts.sum()), dtype=send.dtype)
        send_part, receive_part = [send, way.send_counts, kind], [received, way.receive_counts, kind]
        move(self.comm, lambda: self.comm.Ialltoallv(send_part, receive_part))
        return received

    def _plan_up(self, client: int, mine: list[int], senders: list[list[int]], owner: np.ndarray) -> _Way:
        """Held units to their owners; pieces arrive by sender, then by unit, and go to one buffer a client."""
        sizes = [layout.sizes(self.units, reply=False) for layout in self.layouts]
        own = sizes[client]
        sent = [index for index in mine if senders[client][index] == self.comm.rank]
        start_held, start_sent = _starts(mine, own), _starts(sent, own)
        pack = [Span(0, start_held[i], start_sent[i], int(own[i])) for i in sent]
        stack_sizes = [int(of_client[self.owned].sum()) for of_client in sizes]
        pieces = []
        for number, per_unit in enumerate(senders):
            starts = _starts(self.owned, sizes[number])
            offset = sum(stack_sizes[:number])
            pieces += [(per_unit[i], i, offset + starts[i], int(sizes[number][i])) for i in self.owned]
        unpack, receive_counts = self._arrange(pieces, arriving=True)
        send_counts = np.bincount(owner[sent], own[sent], self.comm.size).astype(np.int64)
        return _Way(list(_coalesce(pack)), send_counts, receive_counts, unpack, stack_sizes)

    def _plan_down(self, client: int, mine: list[int], holders: list[list[range]], owner: np.ndarray) -> _Way:
        """Owned units to each rank that holds them; they arrive in unit order, the order of the held buffer."""
        sizes = [layout.sizes(self.units, reply=True) for layout in self.layouts]
        pieces = []
        for number, per_unit in enumerate(holders):
            starts = _starts(self.owned, sizes[number])
            pieces += [(rank, i, starts[i], int(sizes[number][i]), number) for i in self.owned for rank in per_unit[i]]
        pack, send_counts = self._arrange(pieces, arriving=False)
        receive_counts = np.bincount(owner[mine], sizes[client][mine], self.comm.size).astype(np.int64)
        numel = int(receive_counts.sum())
        return _Way(pack, send_counts, receive_counts, [Span(0, 0, 0, numel)], [numel])

    def _plan_reading(self, client: int, mine: list[int], owner: np.ndarray) -> list[Span]:
        """From every owner's units, in order, to the held ones, if all clients get the same."""
        sizes = self.layouts[client].sizes(self.units, reply=True)
        starts = np.cumsum(sizes) - sizes
        start_owned = starts - starts[np.searchsorted(owner, owner)]  # less where the owner's first unit starts
        start_held = _starts(mine, sizes)
        return list(_coalesce([Span(int(owner[i]), int(start_owned[i]), start_held[i], int(sizes[i])) for i in mine]))

    def _share(self, memory: SharedMemory) -> SharedMemory | None:
        """Room for what is sent, and where it lies in other ranks' memory; None if there is no room (a collective)."""
        owned = int(self.layouts[0].sizes(self.units, reply=True)[self.owned].sum())
        if not memory.reserve(4 * max(self._up.numel, owned if self.same_back else self._down.numel)):
            return None
        for way in (self._up, self._down):
            starts = np.cumsum(way.send_counts) - way.send_counts
            move(self.comm, partial(self.comm.Ialltoall, starts, way.peer_starts))
        return memory

    def _arrange(self, pieces: list[tuple], arriving: bool) -> tuple[list[Span], np.ndarray]:
        """Runs between a travelling buffer, ordered by (rank, unit), and the places of its pieces; counts per rank."""
        counts = np.zeros(self.comm.size, dtype=np.int64)
        runs, offset = [], 0
        for rank, _, place, length, *source in sorted(pieces):
            runs.append(Span(0, offset, place, length) if arriving else Span(source[0], place, offset, length))
            offset += length
            counts[rank] += length
        return list(_coalesce(runs)), counts


def _starts(indices: Sequence[int], sizes: np.ndarray) -> dict[int, int]:
    """Offset of each unit in a buffer that holds the given units one after the other."""
    offset, found = 0, {}
    for index in indices:
        found[index] = offset
        offset += int(sizes[index])
    return found


def _coalesce(runs: Sequence[Span]) -> Iterator[Span]:
    """Join runs that follow each other in both buffers: few large copies instead of one per unit."""
    current: Span | None = None
    for run in runs:
        if (
            current is not None
            and current.source == run.source
            and current.start + current.length == run.start
            and current.destination + current.length == run.destination
        ):
            current = current._replace(length=current.length + run.length)
            continue
        if current is not None:
            yield current
        current = run
    if current is not None:
        yield current


def _cut(runs: Sequence[Span], ends: np.ndarray) -> Iterator[tuple[int, int, Span]]:
    """Runs of a buffer cut where the parts that make it up end: (part, its start, piece)."""
    for run in runs:
        start = run.start
        while start < run.start + run.length:
            part = int(np.searchsorted(ends, start, side="right"))
            length = min(int(ends[part]), run.start + run.length) - start
            first = int(ends[part - 1]) if part else 0
            yield part, first, Span(run.source, start, run.destination + start - run.start, length)
            start += length


def _copy(sources: Sequence[torch.Tensor], runs: list[Span], result: torch.Tensor) -> None:
    """Fill `result` by the runs, converting as it is done."""
    for source, start, destination, length in runs:
        result[destination : destination + length].copy_(sources[source][start : start + length])


def _sum_into(total: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Sum in pieces that stay in cache, so that memory is read once and written once."""
    for piece, *rest in zip(total.split(SUM_PIECE), *(part.split(SUM_PIECE) for part in parts), strict=True):
        piece.copy_(rest[0])
        for other in rest[1:]:
            piece += other


def _fill(sources: Sequence[np.ndarray], runs: list[Span], numel: int) -> np.ndarray:
    """A buffer of `numel` elements filled by the runs; the source itself where they change nothing."""
    if len(sources) == 1 and numel == len(sources[0]) and runs == [Span(0, 0, 0, numel)]:
        return sources[0]
    result = np.empty(numel, dtype=np.float32)
    for source, start, destination, length in runs:
        result[destination : destination + length] = sources[source][start : start + length]
    return result
