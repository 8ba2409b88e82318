"""Test DMR's (Dynamic Modulated Routing's) server step by hand."""

import pytest
import torch

from ubsmoe_ds.aggregation.dmr import coefficient_of_variation, server_step, target_utilisation


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
