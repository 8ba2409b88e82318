"""Fairness of losses by hand, and what holds for all losses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.federation.fairness import fairness_scalars, variance, worst_tenth
from ubsmoe_ds.federation.metrics import evaluation_scalars

LOSSES = st.lists(st.floats(0, 100), min_size=2, max_size=40)


def test_by_hand():
    """Of 12 losses the worst tenth are ceil(1.2) = 2; the mean of 1, 2, 6 is 3, so the variance is (4 + 1 + 9) / 3."""
    assert worst_tenth([1.0, 7.0, *[2.0] * 9, 4.0]) == 5.5
    assert worst_tenth([1.0, 3.0, 2.0]) == 3.0  # at least one client
    assert worst_tenth([float(n) for n in range(10)]) == 9.0
    assert variance([1.0, 2.0, 6.0]) == pytest.approx(14 / 3)
    assert fairness_scalars([3.0]) == fairness_scalars([]) == {}


@given(LOSSES)
def test_as_numpy_does_it(losses):
    assert variance(losses) == pytest.approx(np.var(losses), abs=1e-9)
    assert worst_tenth(losses) == pytest.approx(np.mean(np.sort(losses)[-int(np.ceil(len(losses) / 10)) :]))


@given(LOSSES, st.floats(0, 10), st.randoms())
def test_order_does_not_count_and_a_shift_moves_the_worst_alone(losses, shift, random):
    shifted = [loss + shift for loss in random.sample(losses, len(losses))]
    assert worst_tenth(shifted) == pytest.approx(worst_tenth(losses) + shift)
    assert variance(shifted) == pytest.approx(variance(losses), abs=1e-6)


def test_only_clients_with_rows_of_their_own_count():
    """Own losses: b 2 / 4 = 0.5, c 6 / 4 = 1.5; a has the common rows' 2, which is no loss of its own."""
    sums = np.array([[[6.0, 3, 0, 0, 0, 0, 4]]])
    own_CF = np.array([[0.0] * 7, [2.0, 4, 0, 0, 0, 0, 2], [6.0, 4, 0, 0, 0, 0, 2]])
    scalars = evaluation_scalars(["a", "b", "c"], ["k2"] * 3, [0.4, 0.3, 0.3], ["text"], sums, 0.0, own_CF)
    assert (scalars["fairness/worst_tenth"], scalars["fairness/variance"]) == (1.5, 0.25)
    assert [scalars[f"eval_loss/{name}"] for name in "abc"] == [2.0, 0.5, 1.5]
    common = evaluation_scalars(["a", "b", "c"], ["k2"] * 3, [0.4, 0.3, 0.3], ["text"], sums, 0.0)
    assert not any(name.startswith("fairness/") for name in common)
