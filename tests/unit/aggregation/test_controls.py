"""SCAFFOLD on quadratics: two rounds of two clients worked by hand, and option II for plain SGD."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ubsmoe_ds.aggregation.blocks import Block
from ubsmoe_ds.aggregation.controls import Controls
from ubsmoe_ds.client.drift import DriftCorrection
from ubsmoe_ds.client.gradients import MasterWeights


class Group:
    """One group that trains clients f_i(x) = a_i (x - b_i)^2 / 2 in turn, each with `steps` steps of SGD."""

    def __init__(self, x: float, quadratics: list[tuple[float, float]], rate: float, steps: int, clients: int) -> None:
        module = nn.Linear(1, 1, bias=False)
        self.w, self.x, self.quadratics, self.rate, self.steps = module.weight, x, quadratics, rate, steps
        self.optimizer = torch.optim.SGD([self.w], lr=rate)
        drift = DriftCorrection(self.optimizer, mu=0.0, scaffold=True, own=[])
        self.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: drift.correct(optimizer))
        store = SimpleNamespace(
            blocks=[Block({"w": self.w}, 1)],
            shared=torch.zeros(1),
            masters=MasterWeights(SimpleNamespace(optimizer=None, module=module)),
        )
        store.parts = lambda flat, lora_rank: [(store.blocks[0], flat)]
        self.controls = Controls(store, drift, lora_rank=1, clients=clients)
        self.own: dict[int, torch.Tensor] = {}

    def train(self, client: int) -> tuple[float, float]:
        """Return (the client's result, the change of its c_i)."""
        a, b = self.quadratics[client]
        self.w.data.fill_(self.x)
        self.controls.drift.begin_round()
        self.controls.begin_round(self.own.get(client))
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            (a * (self.w - b) ** 2 / 2).sum().backward()
            self.optimizer.step()
        return self.w.item(), self.controls.change_of(self.own.get(client), self.steps).item()

    def round(self, cohort: list[int]) -> list[tuple[float, float]]:
        results = [self.train(client) for client in cohort]
        changes = {client: torch.tensor([change]) for client, (_, change) in zip(cohort, results, strict=True)}
        merged = self.controls.merge(changes, SimpleNamespace(total=lambda held: held))
        self.controls.apply(merged)
        self.own |= {client: self.own.get(client, 0.0) + change for client, change in merged.own.items()}
        self.x = sum(y for y, _ in results) / len(results)
        return results

    @property
    def state(self) -> tuple[float, dict[int, float]]:
        return self.controls.common.item(), {n: value.item() for n, value in self.own.items()}


def test_two_rounds_of_two_clients_by_hand():
    """f_0 = x^2 / 2, f_1 = (x - 6)^2, rate 1/2, two steps, from x = 4; the optimum of their sum is 4.

    Round 1, nothing is corrected: client 0 has gradients 4, 2 and goes to 2, 1; client 1 has -4, 0 and goes to 6, 6.
    So c_0 = 3, c_1 = -2, c = 1/2, x = 7/2. Round 2: client 0 is corrected by 1/2 - 3 = -5/2: gradients 7/2, 3, places
    3, 11/4, and c_0 = 13/4. Client 1 is corrected by 1/2 + 2 = 5/2: gradients -5, -5/2, places 19/4, 19/4, and
    c_1 = -15/4. So c = -1/4, and x = 15/4 is nearer to 4 than FedAvg, whose clients end at 7/8 and 6: 55/16.
    """
    group = Group(4.0, [(1.0, 0.0), (2.0, 6.0)], rate=0.5, steps=2, clients=2)
    assert group.round([0, 1]) == [(1.0, 3.0), (6.0, -2.0)]
    assert group.state == (0.5, {0: 3.0, 1: -2.0}) and group.x == 3.5
    assert group.round([0, 1]) == [(2.75, 0.25), (4.75, -1.75)]
    assert group.state == (-0.25, {0: 3.25, 1: -3.75}) and group.x == 3.75


def test_who_is_not_in_the_round_keeps_its_variate_and_counts_in_the_mean():
    """N = 4: c moves by 3 / 4 for client 0 alone; then client 1 begins with c - 0, and c_0 stays."""
    group = Group(4.0, [(1.0, 0.0), (2.0, 6.0)], rate=0.5, steps=2, clients=4)
    group.round([0])
    assert group.state == (0.75, {0: 3.0})
    group.round([1])  # from x = 1, gradients -10, then with 1 + (10 - 0.75) / 2 = 5.625 gradient -0.75
    assert group.state[1] == {0: 3.0, 1: -5.375} and group.state[0] == 0.75 - 5.375 / 4


def test_no_step_changes_nothing():
    group = Group(4.0, [(1.0, 0.0)], rate=0.5, steps=2, clients=1)
    group.train(0)
    assert group.controls.change_of(None, 0).item() == 0.0


numbers = st.floats(-3, 3, width=32)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.125, 2, width=32), numbers), min_size=2, max_size=3), st.integers(1, 5))
def test_the_mean_gradient_is_option_two_for_sgd(quadratics, steps):
    """c_i+ = c_i - c + (x - y) / (K eta), in every round; and c is the mean of all c_i where all take part."""
    group = Group(1.0, quadratics, rate=0.25, steps=steps, clients=len(quadratics))
    for _ in range(3):
        x, (c, own) = group.x, group.state
        for client, (y, change) in enumerate(group.round(list(range(len(quadratics))))):
            expected = own.get(client, 0.0) - c + (x - y) / (steps * 0.25)
            assert own.get(client, 0.0) + change == pytest.approx(expected, abs=1e-4)
        c, own = group.state
        assert c == pytest.approx(sum(own.values()) / len(own), abs=1e-5)
