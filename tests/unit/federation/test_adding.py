"""Clients that a group adds up while it trains them: by hand, against the merge of all updates, and refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny
from ubsmoe_ds.aggregation.exchange import weighted_sum
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.client.engine import LocalStats
from ubsmoe_ds.client.turn import OwnPart, Turn, Turns
from ubsmoe_ds.federation.adding import APART, HeldUnits, add_up, length, weighted_updates
from ubsmoe_ds.federation.statistics import gather, without_left_out

UNITS = [Unit(f"layers.0.experts.{e}.gate", "lora", expert=e, lora=(1, 2)) for e in range(2)]
SIZE = 6  # elements: two units of LoRA rank 1
GROUP = SimpleNamespace(group=0, group_rank=0, sum=lambda values: values, sum_of_group=lambda values: values)
STATS = LocalStats(*[1.0] * 8)


def server_of(weights: list[float], rule: str = "fedavg") -> Server:
    clients = [{"budget": 0.5} for _ in weights]
    exp = tiny.experiment(
        "unused", clients, groups=[{"count": 1}], lora={"rank": 1, "alpha": 1.0}, merge={"rule": rule}
    )
    return Server(exp, UNITS, weights)


def turn_of(client: int, update: list[float], work: float = 1.0, routed: tuple[int, int] = (1, 1)) -> Turn:
    values = torch.tensor(update, dtype=torch.float32)
    counts = torch.tensor([[*routed, *[0] * 6, 4]])  # of 8 experts, and the tokens
    part = OwnPart(float(values.double().square().sum()), 1, work)
    return Turn(client, values, part, STATS, 1.0, 0.1, 8, counts, torch.full((1, 8, 1), float(client + 1)), slot=client)


def taken(server: Server, turns: list[Turn]) -> tuple[Turns, HeldUnits]:
    """Return what a group has after these turns, one after the other."""
    held, group = HeldUnits(UNITS, [0, 1], 1), Turns()
    for turn in turns:
        group.done.append(turn)
        turn.length = length(GROUP, turn)
        if not np.isfinite(turn.length):
            turn.refused = held.refuse(turn.update)
        add_up(GROUP, server, held, group)
    return group, held


def merged(server: Server, group: Turns, held: HeldUnits, screen: float | None = None) -> tuple[np.ndarray, list]:
    """Return (the weighted sum of a round, whether each client is left out)."""
    cohort = [turn.client for turn in group.done]
    model = SimpleNamespace(layers=[SimpleNamespace(num_experts=8)])
    client = SimpleNamespace(
        model=model, gradient_hook=SimpleNamespace(squares=None), learns_scales=False, moments=None
    )
    assert gather(GROUP, client, group, cohort, server.weights, screen, stop=True) is None
    found = gather(GROUP, client, group, cohort, server.weights, screen)
    assert found.stats_C == [STATS] * len(cohort) and found.taken_C.tolist() == [8] * len(cohort)
    server.weigh(cohort, found.work_C.tolist(), found.nonfinite.tolist())
    group = without_left_out(group, found)
    refused = [(cohort.index(turn.client), UNITS[number]) for turn in group.done for number in turn.refused]
    weight_CU = server.unit_weights(UNITS, found.usage, refused)
    parts = weighted_updates(group, cohort, held, weight_CU, server.weight)
    return weighted_sum(parts, torch.full((SIZE,), 9.0)).numpy(), found.left_out_C.tolist()


def test_by_hand():
    """Weights 0.1 to 0.4; client 1 did half of the work. The shortest two are added up, and their moments too."""
    turns = [
        turn_of(client, [value] * SIZE, work)
        for client, value, work in [(0, 1.0, 1.0), (1, 2.0, 0.5), (2, 3.0, 1.0), (3, 8.0, 1.0)]
    ]
    group, held = taken(server_of([0.1, 0.2, 0.3, 0.4]), turns)
    assert [turn.update is None for turn in group.done] == [True, False, True, False]  # client 1's length counts double
    torch.testing.assert_close(group.total, torch.full((SIZE,), 0.1 * 1 + 0.3 * 3))
    torch.testing.assert_close(group.total_LEX, torch.full((1, 8, 1), 0.1 * 1 + 0.3 * 3))
    total, _ = merged(server_of([0.1, 0.2, 0.3, 0.4]), group, held)
    np.testing.assert_allclose(total, (0.1 * 1 + 0.1 * 2 + 0.3 * 3 + 0.4 * 8) / 0.9, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.05, 1.0), st.floats(-3, 3), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 4)),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from(["fedavg", "activation"]),
)
def test_the_sum_is_that_of_the_rule_on_all_updates(clients, rule):
    """The peer is the merge of the stack of all updates, which knows no sums."""
    if not any(work for _, _, work, _ in clients):
        return
    weights = [weight for weight, *_ in clients]
    updates = [[value + n for n in range(SIZE)] if work else [0.0] * SIZE for _, value, work, _ in clients]
    turns = [turn_of(c, updates[c], work, routed=(used, 4 - used)) for c, (_, _, work, used) in enumerate(clients)]
    server = server_of(weights, rule)
    group, held = taken(server, turns)
    assert sum(turn.update is not None for turn in group.done) == min(APART, len(clients))
    found, _ = merged(server, group, held)
    usage = Usage(
        torch.tensor([[[used / 4, 1 - used / 4, *[0.0] * 6]] for *_, used in clients]).double(), torch.zeros(1, 8)
    )
    arrays = [np.array(update, dtype=np.float32) for update in updates]
    server.weigh(range(len(clients)), [work for _, _, work, _ in clients], [False] * len(clients))
    (expected, *_) = server.merge(arrays, usage, [1] * len(clients))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_of_a_broken_update_only_the_broken_unit_counts_for_nothing(bad):
    weights = [0.1, 0.2, 0.3, 0.4]
    turns = [turn_of(client, [float(client + 1)] * SIZE) for client in range(4)]
    broken = turn_of(1, [bad, *[2.0] * 5])
    server = server_of(weights)
    group, held = taken(server, [turns[0], broken, *turns[2:]])
    assert broken.refused == [0] and broken.update is None
    total, _ = merged(server, group, held)
    np.testing.assert_allclose(total[:3], (0.1 * 1 + 0.3 * 3 + 0.4 * 4) / 0.8, rtol=1e-6)
    np.testing.assert_allclose(total[3:], 0.1 * 1 + 0.2 * 2 + 0.3 * 3 + 0.4 * 4, rtol=1e-6)
    torch.testing.assert_close(group.total_LEX, torch.full((1, 8, 1), 0.1 * 1))  # of client 0 alone


def test_two_huge_updates_are_left_out_alone_and_a_third_takes_those_that_are_added_up_along():
    ones = [turn_of(client, [1.0] * SIZE) for client in range(4)]
    group, held = taken(server_of([0.1] * 6), [*ones, turn_of(4, [1e9] * SIZE), turn_of(5, [1e8] * SIZE)])
    total, out = merged(server_of([0.1] * 6), group, held, screen=30)
    assert out == [False] * 4 + [True] * 2
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    ones = [turn_of(client, [1.0] * SIZE) for client in range(4)]
    huge = [turn_of(client, [1e9] * SIZE) for client in (4, 5, 6)]
    group, held = taken(server_of([0.1] * 7), [*ones, *huge])
    total, out = merged(server_of([0.1] * 7), group, held, screen=30)
    assert out == [True] * 7 and not total.any()
    assert float(group.total[0]) > 1e6  # and nothing is lost if a death makes the others merge again
