"""Functions that the ranks of the exchange's tests run, with made-up values of units in place of a model's."""

from typing import Any
from unittest import mock

import numpy as np

from tests.support import tiny


def exchange(
    layouts: list[list[int]], units: list[list], num_experts: int, weights: list[float], payloads: list[str]
) -> dict[str, Any]:
    """Exchange random values once in each payload; client c's value of a unit is the same on all ranks that hold it.

    A layout is [ranks, expert parallelism, LoRA rank sent, LoRA rank of the reply]. The reply to client c is the
    weighted sum of the first elements of the clients' units, as many as c has, plus c.
    """
    return {
        f"{payload}/{key}": value
        for payload in payloads
        for key, value in _exchange_in(payload, layouts, units, num_experts, weights).items()
    }


def _exchange_in(
    payload: str, layouts: list[list[int]], units: list[list], num_experts: int, weights: list[float]
) -> dict[str, np.ndarray]:
    import torch
    from mpi4py import MPI

    from ubsmoe_ds.aggregation.exchange import Exchange
    from ubsmoe_ds.aggregation.layout import GroupLayout, Unit, owners
    from ubsmoe_ds.aggregation.shared_memory import SharedMemory

    comm = MPI.COMM_WORLD
    firsts = np.cumsum([0, *[layout[0] for layout in layouts]])
    placed = [GroupLayout(int(first), *layout) for first, layout in zip(firsts, layouts, strict=False)]
    listed = [
        Unit(name, "lora" if lora else "router", numel, expert, tuple(lora) if lora else None)
        for name, numel, expert, lora in units
    ]
    client = int(np.searchsorted(firsts, comm.rank, side="right")) - 1
    owner, memory = owners(listed, 4, comm.size), SharedMemory.of_job(comm)
    assert memory is not None
    held = _held(listed, placed[client], num_experts, comm.rank, client)
    merged, reduced, same_replies = [], [], []
    for shared in (None, memory, memory):  # by messages; through memory; through memory that holds old values
        exchange = Exchange(comm, placed, listed, num_experts, owner, payload, shared)
        assert exchange.memory is shared
        merged.append(_exchange_once(exchange, listed, held, weights))
        if exchange.is_reducible:
            whole, weight = torch.from_numpy(held), weights[client]
            of_each = torch.full((len(held),), weight)
            for parts in ([(whole, weight)], [(whole, of_each)], [(whole, weight / 2), (whole, of_each / 2)]):
                reduced.append(exchange.gather(exchange.reduce(parts)))
        with_same_reply = Exchange(comm, placed, listed, num_experts, owner, payload, shared, same_reply=True)
        if len({(layout.lora_rank, layout.reply_rank) for layout in placed}) == 1:
            same_replies.append(_exchange_once(with_same_reply, listed, held, weights))
    assert all(np.allclose(reduced[0], other) for other in reduced)
    assert all(np.array_equal(same_replies[0], other) for other in same_replies[1:])
    assert all(np.array_equal(merged[0], other) for other in merged[1:])
    with mock.patch("ubsmoe_ds.aggregation.shared_memory._free_bytes", return_value=0):  # a container's small /dev/shm
        assert Exchange(comm, placed, listed, num_experts, owner, payload, SharedMemory(comm)).memory is None
        uneven = SharedMemory(comm)
        with mock.patch("ubsmoe_ds.aggregation.shared_memory._free_bytes", return_value=2**30):
            assert uneven.reserve([1000 * (comm.size - comm.rank), 10 * comm.rank])
        assert not uneven.reserve([1000 * comm.size, 0])  # no free memory, and the regions held are too small
        assert uneven.reserve([1000, 0])
    _take_rooms_in_turn(comm, uneven)
    owned = sum(listed[u].size(4) for u in exchange.owned)
    results = {"merged": merged[0], "owned": np.array(owned), "bytes": np.array(exchange.bytes_sent)}
    results["squares"] = np.array(exchange.sent_squares(held))
    optional = {"reduced": reduced, "same_reply": same_replies}
    return results | {key: values[0] for key, values in optional.items() if values}


def _take_rooms_in_turn(comm: Any, memory: Any) -> None:
    """Write to one room or the other; slow readers must find what was published, whoever is ahead."""
    import time

    import torch

    for number, room in enumerate((0, 1, 0, 1, 1, 1, 0, 0, 1)):
        numel = 2 if room == 0 or comm.rank else 0  # the first rank has no second room
        memory.write(room, numel, torch.float32).fill_(10 * number + comm.rank)
        memory.publish()
        time.sleep(0.003 * ((number + comm.rank) % comm.size))
        for rank in range(comm.size):
            read = memory.read(room, rank, torch.float32)
            assert read[:2].tolist() == [10 * number + rank] * (2 if room == 0 or rank else 0)


def _held(listed: list, layout: Any, num_experts: int, rank: int, client: int) -> np.ndarray:
    """Return a rank's values of the units that it holds."""
    held = [unit for unit in listed if rank in layout.holders(unit, num_experts)]
    sizes = layout.sizes(held, reply=False)
    values = [tiny.federated_value(unit.name, client, (int(size),)) for unit, size in zip(held, sizes, strict=True)]
    return np.concatenate(values)


def _exchange_once(exchange: Any, listed: list, held: np.ndarray, weights: list[float]) -> np.ndarray:
    """Collect, sum and distribute; under `same_reply` the client's number is not added."""
    placed = exchange.layouts
    received = exchange.collect(held)
    replies: list[list[np.ndarray]] = [[] for _ in placed]
    starts = [0] * len(placed)
    for u in exchange.owned:
        for c, layout in enumerate(placed):
            numel = int(layout.sizes(listed, reply=True)[u])
            total = np.full(numel, 0 if exchange.same_reply else c, dtype=np.float32)
            for other, (flat, weight) in enumerate(zip(received, weights, strict=True)):
                value = flat[starts[other] :][: int(placed[other].sizes(listed, reply=False)[u])]
                total[: len(value)] += weight * value[:numel]
            replies[c].append(total)
        for c, layout in enumerate(placed):
            starts[c] += int(layout.sizes(listed, reply=False)[u])
    joined = [np.concatenate([np.zeros(0, np.float32), *of_client]) for of_client in replies]
    return exchange.distribute(joined[:1] * len(joined) if exchange.same_reply else joined)
