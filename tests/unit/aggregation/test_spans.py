"""Spans of an exchange, by hand and carried out for all ranks in one process, without MPI."""

import numpy as np
import pytest

from ubsmoe_ds.aggregation.layout import GroupLayout, Unit, owners
from ubsmoe_ds.aggregation.spans import RankSpans, Span, Transfer, coalesce, cut

EXPERTS = 4
UNITS = [
    Unit("router", "router", 5),
    *(Unit(f"{expert}.gate", "lora", expert=expert, lora=(3, 2)) for expert in range(EXPERTS)),
    Unit("phi", "phi", 8),
]
# clients of one, two and four ranks; the last has two replicas of each expert and gets a smaller LoRA rank back
LAYOUTS = [GroupLayout(0, 1, 1, 2), GroupLayout(1, 2, 2, 3), GroupLayout(3, 4, 2, 4, reply_rank=1)]
RANKS = 7


def all_ranks(layouts: list[GroupLayout]) -> list[RankSpans]:
    owner = owners(UNITS, 4, RANKS)
    return [RankSpans(rank, RANKS, layouts, UNITS, EXPERTS, owner) for rank in range(RANKS)]


def fill(sources: list[np.ndarray], spans: list[Span], numel: int) -> np.ndarray:
    result = np.full(numel, np.nan, dtype=np.float32)
    for source, start, destination, length in spans:
        result[destination : destination + length] = sources[source][start : start + length]
    assert not np.isnan(result).any()
    return result


def carry_out(transfers: list[Transfer], sources: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Every rank's result buffers, once from messages and once from the other ranks' send buffers."""
    sent = [fill(source, t.pack, t.send_numel) for t, source in zip(transfers, sources, strict=True)]
    parts = [np.split(buffer, np.cumsum(t.send_counts)[:-1]) for t, buffer in zip(transfers, sent, strict=True)]
    starts = np.array([np.cumsum(t.send_counts) - t.send_counts for t in transfers])
    results = []
    for rank, transfer in enumerate(transfers):
        arrived = [of_peer[rank] for of_peer in parts]
        assert [len(part) for part in arrived] == transfer.receive_counts.tolist()
        transfer.peer_starts[:] = starts[:, rank]
        flat = fill([np.concatenate(arrived)], transfer.unpack, sum(transfer.result_sizes))
        np.testing.assert_array_equal(fill(sent, transfer.read, len(flat)), flat)
        results.append(np.split(flat, np.cumsum(transfer.result_sizes)[:-1]))
    return results


def values(indices, sizes: np.ndarray, client: int) -> np.ndarray:
    """Element e of unit u at client c: 1000 c + 100 u + e."""
    ranges = [1000 * client + 100 * index + np.arange(sizes[index]) for index in indices]
    return np.concatenate([np.zeros(0), *ranges]).astype(np.float32)


def held_by(rank: int, client: int) -> list[int]:
    return [index for index, unit in enumerate(UNITS) if rank in LAYOUTS[client].holders(unit, EXPERTS)]


def test_owners_get_every_clients_units_and_holders_get_them_back():
    ranks = all_ranks(LAYOUTS)
    sizes = [layout.sizes(UNITS, reply=False) for layout in LAYOUTS]
    held = [[values(held_by(rank, s.client), sizes[s.client], s.client)] for rank, s in enumerate(ranks)]
    assert [len(buffer) for (buffer,) in held] == [s.held_numel for s in ranks]
    collected = carry_out([s.to_owners() for s in ranks], held)
    for s, results in zip(ranks, collected, strict=True):
        for client, result in enumerate(results):
            np.testing.assert_array_equal(result, values(s.owned, sizes[client], client))
    sizes = [layout.sizes(UNITS, reply=True) for layout in LAYOUTS]
    replies = [[values(s.owned, client_sizes, c) for c, client_sizes in enumerate(sizes)] for s in ranks]
    assert [[len(reply) for reply in per_rank] for per_rank in replies] == [s.reply_numel for s in ranks]
    distributed = carry_out([s.to_holders() for s in ranks], replies)
    for rank, (s, (result,)) in enumerate(zip(ranks, distributed, strict=True)):
        np.testing.assert_array_equal(result, values(held_by(rank, s.client), sizes[s.client], s.client))


def test_held_units_are_read_from_their_owners():
    layouts = [GroupLayout(layout.first, layout.ranks, layout.expert_parallel, 4) for layout in LAYOUTS]
    ranks, sizes = all_ranks(layouts), layouts[0].sizes(UNITS, reply=True)
    owned = [values(s.owned, sizes, 0) for s in ranks]
    for rank, s in enumerate(ranks):
        expected = values(held_by(rank, s.client), sizes, 0)
        np.testing.assert_array_equal(fill(owned, s.from_owners(), len(expected)), expected)


@pytest.mark.parametrize(
    "spans, expected",
    [
        ([], []),
        ([Span(0, 0, 4, 2), Span(0, 2, 6, 3)], [Span(0, 0, 4, 5)]),
        ([Span(0, 0, 4, 2), Span(1, 2, 6, 3)], [Span(0, 0, 4, 2), Span(1, 2, 6, 3)]),  # another source
        ([Span(0, 0, 4, 2), Span(0, 3, 6, 3)], [Span(0, 0, 4, 2), Span(0, 3, 6, 3)]),  # a gap in the source
        ([Span(0, 0, 4, 2), Span(0, 2, 7, 3)], [Span(0, 0, 4, 2), Span(0, 2, 7, 3)]),  # a gap in the destination
    ],
)
def test_spans_that_follow_each_other_are_joined(spans, expected):
    assert list(coalesce(spans)) == expected


def test_spans_are_cut_where_parts_end():
    """Parts of 3, 0 and 5 elements: elements 1 to 6 are two of the first and four of the last."""
    pieces = list(cut([Span(0, 1, 10, 6)], np.array([3, 3, 8])))
    assert pieces == [(0, 0, Span(0, 1, 10, 2)), (2, 3, Span(0, 3, 12, 4))]
