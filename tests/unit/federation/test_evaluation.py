"""Which group evaluates which client on its own rows, as whom; without a model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.unit.federation.test_roster import SHAPE
from ubsmoe_ds.client.evaluation import FIELDS
from ubsmoe_ds.federation.evaluation import evaluate_part
from ubsmoe_ds.federation.roster import Amount, Roster
from ubsmoe_ds.federation.texts import Evaluators

EXPERTS = 8


class FakeEngine:
    """Counts the tokens of the rows that it was given since the counts began, all at the first expert."""

    def __init__(self) -> None:
        self.k, self.routed, self.model = 0, 0, SimpleNamespace(layers=["a layer"])

    def reset_counts(self) -> None:
        self.routed = 0

    def routed_counts(self) -> torch.Tensor:
        return torch.tensor([[self.routed, *[0] * (EXPERTS - 1), self.routed]])


class FakeEvaluator:
    """Adds one row of `tokens` tokens, and notes the K and the ranks that share them."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.asked, self.tasks = tokens, [], ["all"]

    def sums(self, client, k, worker, workers, stop) -> np.ndarray:
        self.asked.append((k, worker, workers))
        client.routed += self.tokens
        return np.full((1, len(FIELDS)), float(k))


def evaluated(group: int, common: FakeEvaluator | None, own: dict[int, FakeEvaluator]):
    """Return (part, clients that the group became) of four clients of K 1 4 2 3 on groups of one and of two ranks."""
    clients = [{"budget": budget, "eval_source": "jsonl:own"} for budget in (0.25, 1.0, 0.5, 0.75)]
    exp = tiny.experiment("unused", clients, groups=[{}, {"ranks": 2}])
    amounts = [Amount(1, own[client].tokens) if client in own else Amount(0, 0) for client in range(4)]
    engine, became = FakeEngine(), []

    def become(client: int) -> None:
        became.append(client)
        engine.k = exp.active_experts(exp.clients[client])

    training = SimpleNamespace(
        exp=exp,
        client=engine,
        become=become,
        world=SimpleNamespace(group=group, group_rank=0, rank=group, comm=SimpleNamespace(size=3)),
        roster=Roster(exp, SHAPE, [Amount(10, 100)] * 4, amounts),
        texts=SimpleNamespace(evaluators=Evaluators(common, own.get)),
    )
    return evaluate_part(training, lambda: False), became


def test_each_client_is_evaluated_once_by_one_group_as_itself():
    """c1 is most work, and goes to the faster group g1, c3 and c2 to where they are done soonest; c0 has no rows."""
    own = {1: FakeEvaluator(90), 2: FakeEvaluator(10), 3: FakeEvaluator(30)}
    parts, became = zip(*(evaluated(group, FakeEvaluator(7), own) for group in (0, 1)), strict=True)
    # both groups become each view first; then each its own clients
    assert [clients[:4] for clients in became] == [[0, 1, 2, 3]] * 2
    assert [clients[4:] for clients in became] == [[3, 2], [1]]
    assert [evaluator.asked for evaluator in own.values()] == [[(4, 0, 2)], [(2, 0, 1)], [(3, 0, 1)]]
    total = parts[0].own_C + parts[1].own_C
    assert total[:, 0].tolist() == [0, 4, 2, 3]
    assert parts[0].routed_GLX[:, 0, -1].tolist() == [7] * 4, "utilisation is of the common rows"


def test_without_common_rows_no_view_is_evaluated_and_utilisation_is_of_the_own_rows():
    own = {client: FakeEvaluator(10 * client + 10) for client in range(4)}
    parts, became = zip(*(evaluated(group, None, own) for group in (0, 1)), strict=True)
    assert sorted([*became[0], *became[1]]) == [0, 1, 2, 3]
    assert sum(part.routed_GLX for part in parts)[:, 0, -1].tolist() == [10, 20, 30, 40]
    assert parts[0].sums_G.shape == (4, 0, len(FIELDS))


def test_a_client_of_a_group_of_its_own_becomes_nobody():
    exp = tiny.experiment("unused", [{"budget": 0.5}, {"budget": 1.0, "eval_source": "jsonl:own"}])
    own = FakeEvaluator(5)
    training = SimpleNamespace(
        exp=exp,
        client=FakeEngine(),
        own=1,
        become=lambda client: pytest.fail("became another client"),
        world=SimpleNamespace(group=1, group_rank=0),
        roster=Roster(exp, SHAPE, [Amount(10, 100)] * 2, [Amount(0, 0), Amount(1, 5)]),
        texts=SimpleNamespace(evaluators=Evaluators(FakeEvaluator(7), {1: own}.get)),
    )
    training.client.k = 4
    part = evaluate_part(training, lambda: False)
    assert own.asked == [(4, 0, 1)] and part.own_C[:, 0].tolist() == [0, 4]
