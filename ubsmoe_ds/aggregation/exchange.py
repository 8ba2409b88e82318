"""Move units between the ranks that hold them and their owners over MPI, without a central server and without merging.

A unit is one module's trainable state. A fixed map spreads the units over all ranks by bytes; the rank that a unit is
assigned to is its owner. In a round the holders of a unit (one per client) send their update to its owner (`collect`),
the owner merges what all clients sent, and sends each client's result to every rank of it that holds the unit
(`distribute`). Both directions are one Alltoallv of contiguous fp32 or bf16; where all ranks are on one host they read
it from each other's memory instead. Clients may differ in ranks, in expert parallelism (experts are re-sharded in
transit) and in LoRA rank, which decides how many elements a unit has for them.

Shapes: C clients, N elements of the units of one owner, as one client sends or receives them.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from mpi4py import MPI

from ubsmoe_ds.aggregation.layout import GroupLayout, Unit
from ubsmoe_ds.aggregation.shared_memory import SharedMemory
from ubsmoe_ds.aggregation.spans import RankSpans, Span, Transfer
from ubsmoe_ds.mpi.collectives import move

TO_OWNERS, FROM_OWNERS = 0, 1  # rooms of shared memory; replies that differ are large, and use the first one too
SUM_PIECE = 2**16  # elements
SQUARES_PIECE = 2**11  # elements whose squares are summed in the precision of the elements
TINY_SQUARES = 1e-20  # of a sum in fp32: below it squares of elements may have become 0

Weighted = tuple[torch.Tensor, torch.Tensor | float]  # fp32 elements, and a factor of all or one of each


class Exchange:
    """Exchanges units between all ranks of the job, for given layouts.

    Args:
        comm: the job's communicator.
        layouts: of all clients, in the order of the merge's C axis.
        units: of the whole model, the same list on every rank.
        num_experts: experts of the model.
        owner: see `owners`; it stays the same when LoRA ranks change.
        payload: "fp32" or "bf16".
        memory: shared memory of ranks that are all on one host; None: they send messages.
        same_reply: whether all clients get the same reply, as under elementwise rules; on one host it is written once.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layouts: Sequence[GroupLayout],
        units: Sequence[Unit],
        num_experts: int,
        owner: np.ndarray,
        payload: str = "fp32",
        memory: SharedMemory | None = None,
        same_reply: bool = False,
    ) -> None:
        self.comm, self.layouts, self.payload, self.same_reply = comm, layouts, payload, same_reply
        self.reply_ranks = [layout.lora_rank if layout.reply_rank is None else layout.reply_rank for layout in layouts]
        spans = RankSpans(comm.rank, comm.size, layouts, units, num_experts, owner)
        self.owned, self.held_numel, self._reply_numel = spans.owned, spans.held_numel, spans.reply_numel
        self._to_owners, self._to_holders = spans.to_owners(), spans.to_holders()
        self._from_owners = spans.from_owners()
        self.memory = None if memory is None else self._share(memory)
        sent = self._to_owners.send_counts + self._to_holders.send_counts
        width = 2 if payload == "bf16" else 4
        self.bytes_sent = width * int(sent.sum() - sent[comm.rank])  # to other ranks, in one round

    def collect(self, held: np.ndarray, exact: bool = False) -> list[np.ndarray]:
        """Return every client's values of the units that this rank owns (a collective over the job).

        Args:
            held: fp32, the units that this rank holds, in unit order, concatenated.
            exact: send fp32 whatever the payload.

        Returns:
            One fp32 array a client, the owned units in order.

        Raises:
            ValueError: if `held` has another shape or dtype.
        """
        if held.shape != (self.held_numel,) or held.dtype != np.float32:
            raise ValueError(f"held must be float32 of {self.held_numel} elements, got {held.dtype} {held.shape}")
        return self._carry_out(self._to_owners, [held], exact)

    def sent_squares(self, held: np.ndarray) -> float:
        """Return the sum of squares of what this rank sends; over the ranks of a client each unit counts once.

        Args:
            held: fp32, as in `collect`.
        """
        parts = [held[span.start : span.start + span.length] for span in self._to_owners.pack]
        total = sum(_squares(part) for part in parts)
        if (math.isfinite(total) and total > TINY_SQUARES) or not held.any():
            return total
        return sum(_squares(part.astype(np.float64)) for part in parts)  # fp32 lacks the range

    def distribute(self, replies: Sequence[np.ndarray]) -> np.ndarray:
        """Send each client its values of the owned units (a collective over the job).

        Args:
            replies: fp32, one array a client; under `same_reply` the same array for all.

        Returns:
            fp32, the units that this rank holds, in unit order, concatenated.

        Raises:
            ValueError: if the replies have other shapes, or differ under `same_reply`.
        """
        if [reply.shape for reply in replies] != [(numel,) for numel in self._reply_numel]:
            shapes = [reply.shape for reply in replies]
            raise ValueError(f"replies must have {self._reply_numel} elements, got shapes {shapes}")
        if self.same_reply and any(reply is not replies[0] for reply in replies):
            raise ValueError("replies must be one and the same array")
        if self.same_reply and self.memory is not None:
            return self._read_owners(self.memory, replies[0])
        return self._carry_out(self._to_holders, replies, exact=False)[0]

    def total(self, held: np.ndarray) -> np.ndarray:
        """Return the sum over clients of the units that this rank holds (a collective over the job).

        Args:
            held: fp32, as in `collect`; all clients have the same LoRA rank.
        """
        if self.is_reducible:
            return self.gather(self.reduce([(torch.from_numpy(held), 1.0)]))
        first, *others = self.collect(held)
        total = first.copy()
        for other in others:
            total += other
        return self.distribute([total] * len(self.layouts))

    @property
    def is_reducible(self) -> bool:
        """Whether every client is one rank and holds the same units, so that MPI can sum in transit."""
        alike = all((layout.ranks, layout.lora_rank) == (1, self.layouts[0].lora_rank) for layout in self.layouts)
        return alike and self.payload == "fp32"

    def reduce(self, parts: Sequence[Weighted]) -> np.ndarray:
        """Return the sum over clients of the units that this rank owns (a collective over the job).

        Args:
            parts: buffers as in `collect` and their factors, which this rank adds up for its clients.

        Returns:
            fp32, the owned units in order.
        """
        counts = self._to_owners.send_counts
        total = np.empty(int(counts[self.comm.rank]), dtype=np.float32)
        if self.memory is not None:
            weighted_sum(parts, self.memory.write(TO_OWNERS, self.held_numel, torch.float32))
            self.memory.publish()
            start = int(counts[: self.comm.rank].sum())
            rooms = [self.memory.read(TO_OWNERS, rank, torch.float32) for rank in range(len(counts))]
            _sum_into(torch.from_numpy(total), [room[start : start + len(total)] for room in rooms])
            return total
        sent = weighted_sum(parts, torch.empty(self.held_numel)).numpy()
        move(
            self.comm,
            lambda: self.comm.Ireduce_scatter([sent, MPI.FLOAT], [total, MPI.FLOAT], counts.tolist(), op=MPI.SUM),
        )
        return total

    def gather(self, owned: np.ndarray) -> np.ndarray:
        """Return every owner's values of its units, in unit order, on every rank (a collective over the job)."""
        if self.memory is not None:
            return self._read_owners(self.memory, owned)
        counts = self._to_owners.send_counts
        whole = np.empty(int(counts.sum()), dtype=np.float32)
        move(self.comm, lambda: self.comm.Iallgatherv([owned, MPI.FLOAT], [whole, counts, MPI.FLOAT]))
        return whole

    def _share(self, memory: SharedMemory) -> SharedMemory | None:
        """Reserve room for what is sent, and learn where it lies in other ranks' memory (a collective).

        Returns:
            None if there is no room.
        """
        sent, owned = self._to_owners.send_numel, int(self._to_owners.send_counts[self.comm.rank])
        if self.same_reply:
            owned = max(owned, self._reply_numel[0])
        else:
            sent = max(sent, self._to_holders.send_numel)
        if not memory.reserve([4 * sent, 4 * owned]):
            return None
        for transfer in (self._to_owners, self._to_holders):
            starts = np.cumsum(transfer.send_counts) - transfer.send_counts
            move(self.comm, partial(self.comm.Ialltoall, starts, transfer.peer_starts))
        return memory

    def _read_owners(self, memory: SharedMemory, owned: np.ndarray) -> np.ndarray:
        """Return the held units of what every owner has for its units, through the host's memory (a collective)."""
        dtype = self._dtype(exact=False)
        memory.write(FROM_OWNERS, len(owned), dtype).copy_(torch.from_numpy(owned))
        memory.publish()
        held = np.empty(sum(span.length for span in self._from_owners), dtype=np.float32)
        peers = [memory.read(FROM_OWNERS, rank, dtype) for rank in range(self.comm.size)]
        _copy(peers, self._from_owners, torch.from_numpy(held))
        return held

    def _carry_out(self, transfer: Transfer, sources: Sequence[np.ndarray], exact: bool) -> list[np.ndarray]:
        """Return the transfer's result buffers, fp32 (a collective)."""
        if self.memory is not None:
            flat = self._through_memory(self.memory, transfer, sources, self._dtype(exact))
        else:
            flat = self._by_messages(transfer, sources, self._dtype(exact))
        return np.split(flat, np.cumsum(transfer.result_sizes)[:-1])

    def _dtype(self, exact: bool) -> torch.dtype:
        """Return the dtype in which data travels."""
        return torch.bfloat16 if self.payload == "bf16" and not exact else torch.float32

    def _through_memory(
        self, memory: SharedMemory, transfer: Transfer, sources: Sequence[np.ndarray], dtype: torch.dtype
    ) -> np.ndarray:
        sent = memory.write(TO_OWNERS, transfer.send_numel, dtype)
        _copy([torch.from_numpy(source) for source in sources], transfer.pack, sent)
        memory.publish()
        flat = np.empty(sum(transfer.result_sizes), dtype=np.float32)
        peers = [memory.read(TO_OWNERS, rank, dtype) for rank in range(self.comm.size)]
        _copy(peers, transfer.read, torch.from_numpy(flat))
        return flat

    def _by_messages(self, transfer: Transfer, sources: Sequence[np.ndarray], dtype: torch.dtype) -> np.ndarray:
        send = _fill(sources, transfer.pack, transfer.send_numel)
        if dtype == torch.bfloat16:
            bits = torch.from_numpy(send).bfloat16().view(torch.uint16).numpy()
            arrived = self._alltoallv(bits, transfer, MPI.UINT16_T)  # MPI knows no bfloat16
            received = torch.from_numpy(arrived).view(torch.bfloat16).float().numpy()
        else:
            received = self._alltoallv(send, transfer, MPI.FLOAT)
        return _fill([received], transfer.unpack, sum(transfer.result_sizes))

    def _alltoallv(self, send: np.ndarray, transfer: Transfer, datatype: MPI.Datatype) -> np.ndarray:
        received = np.empty(int(transfer.receive_counts.sum()), dtype=send.dtype)
        send_part, receive_part = [send, transfer.send_counts, datatype], [received, transfer.receive_counts, datatype]
        move(self.comm, lambda: self.comm.Ialltoallv(send_part, receive_part))
        return received


def weighted_sum(parts: Sequence[Weighted], out: torch.Tensor) -> torch.Tensor:
    """Write the sum of the buffers times their factors to a buffer, zero without any; return it."""
    if not parts:
        return out.zero_()
    (first, factor), *others = parts
    torch.mul(first, factor, out=out)
    for buffer, factor in others:
        out.add_(buffer, alpha=factor) if isinstance(factor, float) else out.addcmul_(buffer, factor)
    return out


def _squares(values: np.ndarray) -> float:
    """Return the sum of squares, the same bits for any number of threads, which a dot product does not promise."""
    whole = len(values) // SQUARES_PIECE * SQUARES_PIECE
    norms = torch.linalg.vector_norm(torch.from_numpy(values[:whole]).view(-1, SQUARES_PIECE), dim=1).numpy()
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in (norms, values[whole:]))


def _copy(sources: Sequence[torch.Tensor], spans: list[Span], result: torch.Tensor) -> None:
    """Copy the spans into `result`, converting its dtype on the fly."""
    for source, start, destination, length in spans:
        result[destination : destination + length].copy_(sources[source][start : start + length])


def _sum_into(total: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Sum in pieces that stay in cache, so that memory is read once and written once."""
    for piece, first, *others in zip(total.split(SUM_PIECE), *(part.split(SUM_PIECE) for part in parts), strict=True):
        piece.copy_(first)
        for other in others:
            piece += other


def _fill(sources: Sequence[np.ndarray], spans: list[Span], numel: int) -> np.ndarray:
    """Return a buffer of `numel` elements filled by the spans; the source itself where they change nothing."""
    if len(sources) == 1 and numel == len(sources[0]) and spans == [Span(0, 0, 0, numel)]:
        return sources[0]
    result = np.empty(numel, dtype=np.float32)
    for source, start, destination, length in spans:
        result[destination : destination + length] = sources[source][start : start + length]
    return result
