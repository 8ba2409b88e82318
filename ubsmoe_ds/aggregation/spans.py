"""Work out which elements of which buffers one rank copies in an exchange. No MPI here; exchange.py moves the data.

Every rank derives its spans and counts from the layouts of all clients, so nothing but the payload is sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ubsmoe_ds.aggregation.layout import GroupLayout, Unit


class Span(NamedTuple):
    """Copy `length` elements from `start` of buffer number `source` to `destination` of the buffer being filled."""

    source: int
    start: int
    destination: int
    length: int


@dataclass
class Transfer:
    """One direction of an exchange, as one rank sees it. Counts are elements, [ranks] int64.

    pack: fill the buffer that this rank sends, ordered by receiving rank
    send_counts, receive_counts: elements for each rank, and from each rank
    unpack: fill the result buffers, which lie one after the other, from what arrived
    result_sizes: elements of each result buffer
    peer_starts: where the part for this rank begins in what each rank sends; set by ranks that share memory
    """

    pack: list[Span]
    send_counts: np.ndarray
    receive_counts: np.ndarray
    unpack: list[Span]
    result_sizes: list[int]
    peer_starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.peer_starts = np.empty_like(self.send_counts)

    @property
    def send_numel(self) -> int:
        """Elements that this rank sends."""
        return int(self.send_counts.sum())

    @cached_property
    def read(self) -> list[Span]:
        """`unpack` with the send buffers of all ranks as sources, for ranks that read each other's memory."""
        ends = np.cumsum(self.receive_counts)
        return [
            Span(peer, int(self.peer_starts[peer]) + piece.start - first, piece.destination, piece.length)
            for peer, first, piece in cut(self.unpack, ends)
        ]


class _Piece(NamedTuple):
    """One client's values of one unit, which travel to or from `peer`: where they lie on this rank."""

    peer: int
    unit: int
    buffer: int
    start: int
    length: int


class RankSpans:
    """The spans of one rank: held units to their owners, and owned units back to the ranks that hold them.

    Attributes:
        owned: indices of the units that this rank owns, in order.
        held_numel: elements of the units that this rank holds, at the LoRA rank that its client sends.
        reply_numel: elements of the owned units in the reply to each client.

    Args:
        rank: this rank of the job.
        ranks: how many ranks the job has.
        layouts: of all clients, in the order of the merge's C axis.
        units: of the whole model, the same list on every rank.
        num_experts: experts of the model.
        owner: see `owners`.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        layouts: Sequence[GroupLayout],
        units: Sequence[Unit],
        num_experts: int,
        owner: np.ndarray,
    ) -> None:
        self.rank, self.ranks, self.owner = rank, ranks, owner
        self.client = max(client for client, layout in enumerate(layouts) if layout.first <= rank)
        self._holders = [[layout.holders(unit, num_experts) for unit in units] for layout in layouts]
        self._send_sizes = [layout.sizes(units, reply=False) for layout in layouts]
        self._reply_sizes = [layout.sizes(units, reply=True) for layout in layouts]
        self._held = [index for index, holders in enumerate(self._holders[self.client]) if rank in holders]
        self.owned = range(*np.searchsorted(owner, [rank, rank + 1]).tolist())
        self.held_numel = int(self._send_sizes[self.client][self._held].sum())
        self.reply_numel = [int(sizes[self.owned].sum()) for sizes in self._reply_sizes]

    def to_owners(self) -> Transfer:
        """Move the held units to their owners. What arrives is ordered by sender, then by unit; one result a client."""
        sizes = self._send_sizes[self.client]
        sent = [index for index in self._held if self._sender(self.client, index) == self.rank]
        start_held, start_sent = _starts(self._held, sizes), _starts(sent, sizes)
        pack = [Span(0, start_held[i], start_sent[i], int(sizes[i])) for i in sent]
        send_counts = np.bincount(self.owner[sent], sizes[sent], self.ranks).astype(np.int64)
        result_sizes = [int(client_sizes[self.owned].sum()) for client_sizes in self._send_sizes]
        pieces = []
        for client, client_sizes in enumerate(self._send_sizes):
            starts, offset = _starts(self.owned, client_sizes), sum(result_sizes[:client])
            pieces += [
                _Piece(self._sender(client, i), i, 0, offset + starts[i], int(client_sizes[i])) for i in self.owned
            ]
        placed, receive_counts = self._in_transit(pieces)
        unpack = [Span(0, offset, piece.start, piece.length) for piece, offset in placed]
        return Transfer(list(coalesce(pack)), send_counts, receive_counts, list(coalesce(unpack)), result_sizes)

    def to_holders(self) -> Transfer:
        """Move the owned units to each rank that holds them; they arrive in unit order, as the held buffer has them."""
        pieces = []
        for client, sizes in enumerate(self._reply_sizes):
            starts = _starts(self.owned, sizes)
            pieces += [
                _Piece(holder, i, client, starts[i], int(sizes[i]))
                for i in self.owned
                for holder in self._holders[client][i]
            ]
        placed, send_counts = self._in_transit(pieces)
        pack = [Span(piece.buffer, piece.start, offset, piece.length) for piece, offset in placed]
        held_sizes = self._reply_sizes[self.client][self._held]
        receive_counts = np.bincount(self.owner[self._held], held_sizes, self.ranks).astype(np.int64)
        numel = int(receive_counts.sum())
        return Transfer(list(coalesce(pack)), send_counts, receive_counts, [Span(0, 0, 0, numel)], [numel])

    def from_owners(self) -> list[Span]:
        """Return the spans from each owner's units, in order, to the held ones, for when all clients get the same."""
        sizes = self._reply_sizes[self.client]
        starts = np.cumsum(sizes) - sizes
        start_owned = starts - starts[np.searchsorted(self.owner, self.owner)]  # less the start of its first unit
        start_held = _starts(self._held, sizes)
        spans = [Span(int(self.owner[i]), int(start_owned[i]), start_held[i], int(sizes[i])) for i in self._held]
        return list(coalesce(spans))

    def _sender(self, client: int, unit: int) -> int:
        """Return which of a client's replicas of a unit sends it: a different one for each unit in turn."""
        holders = self._holders[client][unit]
        return holders[unit % len(holders)]

    def _in_transit(self, pieces: list[_Piece]) -> tuple[list[tuple[_Piece, int]], np.ndarray]:
        """Return each piece with its offset in the buffer that travels, by (peer, unit); and the elements per peer."""
        counts = np.zeros(self.ranks, dtype=np.int64)
        placed, offset = [], 0
        for piece in sorted(pieces):
            placed.append((piece, offset))
            offset += piece.length
            counts[piece.peer] += piece.length
        return placed, counts


def _starts(indices: Sequence[int], sizes: np.ndarray) -> dict[int, int]:
    """Return the offset of each unit in a buffer that holds the given units one after the other."""
    offset, starts = 0, {}
    for index in indices:
        starts[index] = offset
        offset += int(sizes[index])
    return starts


def coalesce(spans: Sequence[Span]) -> Iterator[Span]:
    """Join spans that follow each other in both buffers: few large copies instead of one per unit."""
    current: Span | None = None
    for span in spans:
        if (
            current is not None
            and current.source == span.source
            and current.start + current.length == span.start
            and current.destination + current.length == span.destination
        ):
            current = current._replace(length=current.length + span.length)
            continue
        if current is not None:
            yield current
        current = span
    if current is not None:
        yield current


def cut(spans: Sequence[Span], ends: np.ndarray) -> Iterator[tuple[int, int, Span]]:
    """Cut spans where the parts of their source end: yield (part, the part's start, piece).

    Args:
        spans: spans of one source buffer, which is made up of parts.
        ends: where each part ends, in elements, rising.
    """
    for span in spans:
        start = span.start
        while start < span.start + span.length:
            part = int(np.searchsorted(ends, start, side="right"))
            length = min(int(ends[part]), span.start + span.length) - start
            first = int(ends[part - 1]) if part else 0
            yield part, first, Span(span.source, start, span.destination + start - span.start, length)
            start += length
