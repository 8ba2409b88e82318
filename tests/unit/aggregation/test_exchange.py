"""What one rank says of the units that it sends; tests/distributed/test_exchange.py has several ranks."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

from ubsmoe_ds.aggregation.exchange import SQUARES_PIECE, Exchange
from ubsmoe_ds.aggregation.layout import GroupLayout, Unit

NUMEL = 40 * SQUARES_PIECE + 3


@pytest.fixture
def exchange():
    return Exchange(MPI.COMM_SELF, [GroupLayout(0, 1, 1)], [Unit("router", "router", NUMEL)], 8, np.array([0]))


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_squares_are_those_of_numpy_whatever_fp32_can_hold(scale, exchange):
    held = (np.random.default_rng(0).normal(size=NUMEL) * scale).astype(np.float32)
    assert exchange.sent_squares(held) == pytest.approx(np.square(held.astype(np.float64)).sum(), rel=1e-7)
    assert exchange.sent_squares(np.zeros_like(held)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_squares_are_not_finite_if_a_value_is_not(value, exchange):
    held = np.ones(NUMEL, dtype=np.float32)
    held[-1] = value
    assert not np.isfinite(exchange.sent_squares(held))


def test_squares_are_the_same_bits_for_any_number_of_threads(exchange):
    held = np.random.default_rng(0).normal(size=NUMEL).astype(np.float32)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(exchange.sent_squares(held))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
