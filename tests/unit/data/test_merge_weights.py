"""A client's weight in the merge, by hand."""

import pytest

from ubsmoe_ds.data.client_rows import merge_weights


@pytest.mark.parametrize(
    ("kind", "expected"), [("rows", [0.1, 0.3, 0.6]), ("tokens", [0.5, 0.25, 0.25]), ("equal", [1 / 3, 1 / 3, 1 / 3])]
)
def test_weights_of_three_clients(kind, expected):
    """Rows 1, 3, 6; answer tokens 20, 10, 10."""
    assert merge_weights(kind, [1, 3, 6], [20, 10, 10]) == pytest.approx(expected)


def test_weights_by_rows_are_plain_quotients():
    """To the bit what they were before there was a choice."""
    rows = [301, 1058, 1110, 1136]
    assert merge_weights("rows", rows, [1, 1, 1, 1]) == [count / sum(rows) for count in rows]
