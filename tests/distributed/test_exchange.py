"""The exchange over real MPI ranks against numpy."""

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny import federated_value

# (ranks, expert parallelism, LoRA rank sent, LoRA rank of the reply)
LAYOUTS = {
    "one_two_four": [(1, 1), (2, 2), (4, 4)],
    "replicas": [(4, 2), (2, 1), (1, 1)],
    "single_client": [(2, 2)],
    "one_rank_each": [(1, 1), (1, 1), (1, 1)],
    "more_ranks_than_units": [(4, 4), (4, 1)],
    "unequal_lora_ranks": [(2, 2, 1), (1, 1, 4), (2, 1, 3)],
    "stacks_in_reply": [(2, 2, 1, 8), (1, 1, 4, 8), (2, 1, 3, 8)],
}


TOLERANCE = {"fp32": {"atol": 1e-6, "rtol": 1e-6}, "bf16": {"atol": 0.05, "rtol": 0.02}}


@pytest.mark.parametrize("name", LAYOUTS)
def test_exchange_equals_numpy(name, tmp_path):
    """Every rank gets, for each unit it holds, what numpy computes from all clients' values for its client."""
    layouts = [(*layout, *([2, None][len(layout) - 2 :])) for layout in LAYOUTS[name]]
    size = sum(ranks for ranks, *_ in layouts)
    experts = 4
    few = name == "more_ranks_than_units"
    units = [("router", 5, None, None)] if few else []
    units += [(f"e{e}.{p}", 0, e, (3 + p, 2)) for p in range(1 if few else 3) for e in range(experts)]
    units += [("dmr", 8, None, None)]
    weights = [1.0, 2.0, 4.0][: len(layouts)]
    arguments = {"layouts": layouts, "units": units, "num_experts": experts, "weights": weights}
    results = run_ranks(
        tmp_path, size, "tests.support.exchange_scenarios:exchange", arguments | {"payloads": list(TOLERANCE)}
    )
    rank = 0
    for client, (ranks, ep, sent_rank, reply_rank) in enumerate(layouts):
        sizes = {unit: _elements(numel, lora, sent_rank) for unit, numel, _, lora in units}
        squares = sum(np.square(federated_value(unit, client, (size,))).sum() for unit, size in sizes.items())
        sent = sum(float(result["fp32/squares"]) for result in results[rank : rank + ranks])
        assert sent == pytest.approx(squares, rel=1e-6), "each unit counts once, however many ranks hold it"
        for group_rank in range(ranks):
            held = []
            for unit, numel, expert, lora in units:
                if expert is not None and expert // (experts // ep) != group_rank % ep:
                    continue
                total = np.full(_elements(numel, lora, reply_rank or sent_rank), client, dtype=np.float64)
                for other, (_, _, other_rank, _) in enumerate(layouts):
                    value = federated_value(unit, other, (_elements(numel, lora, other_rank),))[: len(total)]
                    total[: len(value)] += weights[other] * value
                held.append(total)
            for payload in TOLERANCE:
                _compare(name, payload, results[rank], np.concatenate(held), client)
            rank += 1
    for payload in TOLERANCE:
        owned = [int(result[f"{payload}/owned"]) for result in results]
        assert sum(owned) == sum(_elements(numel, lora, 4) for _, numel, _, lora in units)
        assert few or max(owned) < sum(owned) or size == 1, "one rank owns all units"


def _compare(name, payload, result, expected, client):
    """Compare what a rank received: a reply per client, one reply for all, and sums formed in transit."""
    np.testing.assert_allclose(result[f"{payload}/merged"], expected, **TOLERANCE[payload])
    assert (f"{payload}/same_reply" in result) == (name not in ("unequal_lora_ranks", "stacks_in_reply"))
    if f"{payload}/same_reply" in result:
        np.testing.assert_allclose(result[f"{payload}/same_reply"], expected - client, **TOLERANCE[payload])
    assert (f"{payload}/reduced" in result) == (name == "one_rank_each" and payload == "fp32")
    if f"{payload}/reduced" in result:
        np.testing.assert_allclose(result[f"{payload}/reduced"], expected - client, **TOLERANCE[payload])


def _elements(numel, lora, rank):
    return rank * sum(lora) if lora else numel


def test_bf16_halves_the_traffic(tmp_path):
    units = [("e0.gate", 0, 0, (3, 2)), ("e1.gate", 0, 1, (3, 2))]
    arguments = {"layouts": [(1, 1, 4, None), (1, 1, 4, None)], "units": units, "num_experts": 2, "weights": [1.0, 1.0]}
    results = run_ranks(
        tmp_path, 2, "tests.support.exchange_scenarios:exchange", arguments | {"payloads": ["fp32", "bf16"]}
    )
    sent = {payload: [int(result[f"{payload}/bytes"]) for result in results] for payload in ("fp32", "bf16")}
    assert sent["fp32"] == [2 * 20 * 4] * 2  # to the other rank: 20 elements of its unit, and 20 of the reply
    assert sent["bf16"] == [2 * 20 * 2] * 2
