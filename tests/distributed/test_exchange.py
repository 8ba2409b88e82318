"""Merge rules, DMR's server step and the exchange: by hand, by numpy, and over real MPI ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ranks import run_ranks
from tests.support.tiny import federated_value
from ubsmoe_ds.aggregation.dmr import coefficient_of_variation, server_step, target_utilisation
from ubsmoe_ds.aggregation.layout import ClientLayout, Unit, owners
from ubsmoe_ds.aggregation.rules import fedavg


def test_fedavg_by_hand():
    """Weights 1 and 3: (1 * 2 + 3 * 6) / 4 = 5 and (1 * -4 + 3 * 0) / 4 = -1."""
    merged = fedavg(torch.tensor([[2.0, -4.0], [6.0, 0.0]]), torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(merged, torch.tensor([5.0, -1.0]))


@pytest.mark.parametrize("weights", [[[-1.0], [2.0]], [[math.nan], [1.0]], [[math.inf], [1.0]]])
def test_fedavg_refuses_impossible_weights(weights):
    with pytest.raises(ValueError, match="client weights"):
        fedavg(torch.ones(2, 3), torch.tensor(weights))


def test_fedavg_sums_bf16_in_fp32():
    """256 + 1 is 256 in bf16, but the mean of 256 and 1 twice is 86 (bf16 of 86.0)."""
    stack = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    merged = fedavg(stack, torch.ones(3, 1))
    assert merged.dtype == torch.bfloat16 and merged.item() == 86.0


updates = st.integers(1, 5).flatmap(
    lambda c: st.tuples(
        st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=c, max_size=c),
        st.lists(st.floats(0.01, 100), min_size=c, max_size=c),
    )
)


@settings(max_examples=100, deadline=None)
@given(updates, st.floats(0.01, 100), st.randoms())
def test_fedavg_rules(given_updates, scale, random):
    """Order and scale of the weights do not matter; one client is the identity; equal clients give that client."""
    rows, weights = (torch.tensor(part, dtype=torch.float32) for part in given_updates)
    weights = weights.unsqueeze(1)
    merged = fedavg(rows, weights)
    order = list(range(len(rows)))
    random.shuffle(order)
    torch.testing.assert_close(fedavg(rows[order], weights[order]), merged, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(fedavg(rows, weights * scale), merged, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(fedavg(rows[:1], weights[:1]), rows[0])
    torch.testing.assert_close(
        fedavg(rows[:1].expand(3, -1), torch.tensor([[1.0], [2.0], [3.0]])), rows[0], atol=1e-4, rtol=1e-5
    )


def test_server_step_by_hand():
    """Two clients, w = (0.25, 0.75), K = (1, 3), M = 4: u* = (0.25 * 1 + 0.75 * 3) / 4 = 0.625.

    Expert 0 is used exactly so much: tanh(0) = 0. Expert 1 twice: tanh(1/2 - 1) = -0.46212. Expert 2 never:
    tanh(0.625 / eps) = 1. zeta = 0.7 keeps 0.7 of phibar = (1, 1, 0, -1); expert 3 is used half: tanh(1) = 0.76159.
    """
    target = target_utilisation([0.25, 0.75], [1, 3], 4)
    assert target == pytest.approx(0.625)
    phi = server_step(torch.tensor([1.0, 1.0, 0.0, -1.0]), torch.tensor([0.625, 1.25, 0.0, 0.3125]), target, 0.7, 1e-6)
    expected = [0.7, 0.7 - 0.3 * 0.4621172, 0.3, -0.7 + 0.3 * 0.7615942]
    torch.testing.assert_close(phi, torch.tensor(expected), atol=1e-5, rtol=0)


def test_coefficient_of_variation_by_hand():
    """(1, 3): mean 2, deviation 1."""
    torch.testing.assert_close(
        coefficient_of_variation(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([0.5, 0.0])
    )


def test_holders_follow_deepspeeds_expert_groups():
    """Six ranks from 10, expert parallel 2: expert groups (10, 11), (12, 13), (14, 15); 8 experts, 4 a place."""
    layout = ClientLayout(first=10, ranks=6, expert_parallel=2)
    assert list(layout.holders(Unit("e", "router", 1, expert=3), 8)) == [10, 12, 14]
    assert list(layout.holders(Unit("e", "router", 1, expert=4), 8)) == [11, 13, 15]
    assert list(layout.holders(Unit("router", "router", 1), 8)) == [10, 11, 12, 13, 14, 15]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_owners_are_even_and_in_order(sizes, ranks):
    owner = owners([Unit(str(i), "router", size) for i, size in enumerate(sizes)], 1, ranks)
    assert (np.diff(owner) >= 0).all() and owner.min() >= 0 and owner.max() < ranks
    loads = np.bincount(owner, sizes, ranks)
    assert loads.max() <= sum(sizes) / ranks + 2 * max(sizes)


# (ranks, expert parallelism, LoRA rank sent, LoRA rank got back)
LAYOUTS = {
    "one_two_four": [(1, 1), (2, 2), (4, 4)],
    "replicas": [(4, 2), (2, 1), (1, 1)],
    "single_client": [(2, 2)],
    "one_rank_each": [(1, 1), (1, 1), (1, 1)],
    "more_ranks_than_units": [(4, 4), (4, 1)],
    "unequal_lora_ranks": [(2, 2, 1), (1, 1, 4), (2, 1, 3)],
    "stacks_back": [(2, 2, 1, 8), (1, 1, 4, 8), (2, 1, 3, 8)],
}


TOLERANCE = {"fp32": {"atol": 1e-6, "rtol": 1e-6}, "bf16": {"atol": 0.05, "rtol": 0.02}}


@pytest.mark.slow
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
    results = run_ranks(tmp_path, size, "tests.support.scenarios:exchange", arguments | {"payloads": list(TOLERANCE)})
    rank = 0
    for client, (ranks, ep, sent_rank, back_rank) in enumerate(layouts):
        for group_rank in range(ranks):
            held = []
            for unit, numel, expert, lora in units:
                if expert is not None and expert // (experts // ep) != group_rank % ep:
                    continue
                total = np.full(_elements(numel, lora, back_rank or sent_rank), client, dtype=np.float64)
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
        assert few or max(owned) < sum(owned) or size == 1, "one rank owns everything"


def _compare(name, payload, result, expected, client):
    """What a rank got, where clients of equal ranks all get the same, and where sums are formed on the way."""
    np.testing.assert_allclose(result[f"{payload}/merged"], expected, **TOLERANCE[payload])
    assert (f"{payload}/once" in result) == (name not in ("unequal_lora_ranks", "stacks_back"))
    if f"{payload}/once" in result:
        np.testing.assert_allclose(result[f"{payload}/once"], expected - client, **TOLERANCE[payload])
    assert (f"{payload}/reduced" in result) == (name == "one_rank_each" and payload == "fp32")
    if f"{payload}/reduced" in result:
        np.testing.assert_allclose(result[f"{payload}/reduced"], expected - client, **TOLERANCE[payload])


def _elements(numel, lora, rank):
    return rank * sum(lora) if lora else numel


@pytest.mark.slow
def test_bf16_halves_the_traffic(tmp_path):
    units = [("e0.gate", 0, 0, (3, 2)), ("e1.gate", 0, 1, (3, 2))]
    arguments = {"layouts": [(1, 1, 4, None), (1, 1, 4, None)], "units": units, "num_experts": 2, "weights": [1.0, 1.0]}
    found = run_ranks(tmp_path, 2, "tests.support.scenarios:exchange", arguments | {"payloads": ["fp32", "bf16"]})
    sent = {payload: [int(result[f"{payload}/bytes"]) for result in found] for payload in ("fp32", "bf16")}
    assert sent["fp32"] == [2 * 20 * 4] * 2  # 20 elements of the other's unit up, and of the own one back
    assert sent["bf16"] == [2 * 20 * 2] * 2
