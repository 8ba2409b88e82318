"""Corrections against drift on tiny numbers: FedProx's pull on quadratics whose steps are worked by hand."""

import pytest
import torch
from torch import nn

from ubsmoe_ds.client.drift import DriftCorrection
from ubsmoe_ds.client.gradients import Fragment


def stepper(weights: list[nn.Parameter], lr: float, **options) -> tuple[torch.optim.Optimizer, DriftCorrection]:
    """SGD whose gradients are corrected as `GradientHook` does it."""
    optimizer = torch.optim.SGD(weights, lr=lr)
    drift = DriftCorrection(optimizer, **{"mu": 0.0, "scaffold": False, "own": []} | options)
    optimizer.register_step_pre_hook(lambda stepped, args, kwargs: drift.correct(stepped))
    return optimizer, drift


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_fedprox_by_hand():
    """f = w^2 / 2 from w_t = 4, rate 1/2, mu 2: w <- w - (w + 2 (w - 4)) / 2 gives 2, 3, 2.5, towards 8/3.

    The next round begins at 2.5, so its first step is SGD's: 1.25; then 1.25 - (1.25 + 2 (1.25 - 2.5)) / 2 = 1.875.
    """
    w = nn.Parameter(torch.tensor([4.0]))
    optimizer, drift = stepper([w], lr=0.5, mu=2.0)
    for expected in (2.0, 3.0, 2.5):
        step(optimizer, (w**2 / 2).sum())
        assert w.item() == expected
    drift.begin_round()
    for expected in (1.25, 1.875):
        step(optimizer, (w**2 / 2).sum())
        assert w.item() == expected


def test_the_pull_is_the_gradient_of_the_papers_term():
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(5)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer, _ = stepper(ours, lr=0.1, mu=0.7)
    plain = torch.optim.SGD(theirs, lr=0.1)
    for _ in range(3):
        step(optimizer, sum((w**3).sum() for w in ours))
        distance = sum((w - w_t).square().sum() for w, w_t in zip(theirs, start, strict=True))
        step(plain, sum((w**3).sum() for w in theirs) + 0.7 / 2 * distance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_what_stays_with_the_client_is_not_pulled_and_what_has_no_gradient_stays():
    """Element 1 of a flat master is a learned scale: rate 1, f = sum w gives 1 - 1, then 0 - 1."""
    flat, idle = nn.Parameter(torch.tensor([1.0, 1.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer, _ = stepper([flat, idle], lr=1.0, mu=0.5, own=[Fragment(flat, 1, 0, 1)])
    step(optimizer, flat.sum())
    step(optimizer, flat.sum())
    assert flat.tolist() == [0 - (1 - 0.5), -1.0] and idle.tolist() == [3.0]


@pytest.mark.parametrize("group", [0, 1])
def test_one_parameter_group_at_a_time(group):
    """ZeRO steps its groups one after the other; another group's gradient is not touched."""
    weights = [nn.Parameter(torch.tensor([2.0])) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=1.0)
    drift = DriftCorrection(optimizer, mu=1.0, scaffold=False, own=[])
    for w in weights:
        w.data += 1
        w.grad = torch.tensor([5.0])
    optimizer.param_groups = [optimizer.param_groups[group]]
    drift.correct(optimizer)
    assert [w.grad.item() for w in weights] == [6.0 if place == group else 5.0 for place in range(2)]
