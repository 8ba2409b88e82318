"""Moments that experts sum up in training: against loops over rows."""

import pytest
import torch

from tests.support import reference
from ubsmoe_ds.moe.activations import SWIGLU, ClampedSwish
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.frozen import Sizes, WholeExperts


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("activation", [SWIGLU, ClampedSwish(1.7, 0.8)], ids=["swiglu", "clamped, biased"])
def test_moments_are_sums_over_rows(activation, every):
    """Two experts, two ranks, five slots: 5 and 2 tokens for the first, 0 and 4 for the second; against a loop.

    A sample of a quarter of the rows, 5 of 20 at a time, comes to a quarter of the sums in the mean.
    """
    generator = torch.Generator().manual_seed(0)
    base = {"gate": torch.randn(2, 4, 3, generator=generator), "up": torch.randn(2, 4, 3, generator=generator)}
    base["down"] = torch.randn(2, 3, 4, generator=generator)
    experts = StackedExperts(
        WholeExperts(Sizes(2, 4, 3, 2, activation != SWIGLU), torch.float32),
        full_rank=2,
        alpha=2.0,
        group_name="ep_size_1",
        generator=generator,
        num_experts=2,
        first=0,
        activation=activation,
    )
    bias = {name: torch.zeros(2, 4) for name in ("gate", "up")}
    for name, place in experts.bias().items():
        place.copy_(torch.randn(place.shape, generator=generator))
        bias[name] = place
    for name, place in experts.base().items():
        place.copy_(base[name])
    slots = torch.zeros(2, 2, 5, 3)
    expected = torch.zeros(2, 13)
    for (rank, expert), filled in {(0, 0): 5, (1, 0): 2, (0, 1): 0, (1, 1): 4}.items():
        slots[rank, expert, :filled] = torch.randn(filled, 3, generator=generator)
        for x in slots[rank, expert, :filled]:
            values = reference.slopes(activation, *(base[n][expert] @ x + bias[n][expert] for n in ("gate", "up")))
            expected[expert] += torch.cat([*values, torch.ones(1)])
    assert expected[:, -1].tolist() == [7, 4]
    experts.moment_every, experts.moment_sums_EX = every, torch.zeros(2, 13)
    torch.manual_seed(0)
    times = 1 if every == 1 else 2000
    for _ in range(times):
        experts(slots)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if every == 1 else {"atol": 0.05 * expected.abs().max(), "rtol": 0.0}
    torch.testing.assert_close(every * experts.moment_sums_EX / times, expected, **tolerance)
    before = experts.moment_sums_EX.clone()
    experts.eval()(slots)
    torch.testing.assert_close(experts.moment_sums_EX, before)
