"""The fidelity report: its numbers by hand."""

import pytest
import torch

from ubsmoe_ds.studies.fidelity import Measured, bias, summary


def hand_made() -> dict[str, list[Measured]]:
    """Return one layer, two experts with gradients of two elements, two batches; expert 1 is active in the second."""
    dense = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    first = Measured(dense, torch.tensor([[[4.0, 3.0], [0.0, 0.0]]]), torch.tensor([[True, False]]))
    second = Measured(dense, torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.tensor([[True, True]]))
    return {"none": [first, second]}


def test_summary_by_hand():
    """Some: cosines (24 / 25, 1, 1), sizes (1, 1, 0.5); never: no gradient at all, cosine and size 0."""
    table = summary(hand_made(), k=1).set_index("group")
    assert table.loc["never", ["experts", "cosine", "size"]].tolist() == [1, 0, 0]
    assert table.loc["some", "experts"] == 3 and table.loc["some", "size"] == 1
    assert table.loc["some", "cosine"] == pytest.approx((0.96 + 2) / 3)


def test_bias_by_hand():
    """Means (3.5, 3.5) and (0, 0.5): off by sqrt(0.5) of 5 and 1.5 of 2; torch's median of two is the lower."""
    assert bias(hand_made(), k=1).bias.tolist() == pytest.approx([0.5**0.5 / 5])
