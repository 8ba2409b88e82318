"""Test which ranks hold a unit, and which rank owns it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds.aggregation.layout import GroupLayout, Unit, owners


def test_holders_follow_deepspeeds_expert_groups():
    """Six ranks from 10, expert parallel 2: expert groups (10, 11), (12, 13), (14, 15); 8 experts, 4 a place."""
    layout = GroupLayout(first=10, ranks=6, expert_parallel=2)
    assert list(layout.holders(Unit("e", "router", 1, expert=3), 8)) == [10, 12, 14]
    assert list(layout.holders(Unit("e", "router", 1, expert=4), 8)) == [11, 13, 15]
    assert list(layout.holders(Unit("router", "router", 1), 8)) == [10, 11, 12, 13, 14, 15]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_owners_are_even_and_in_order(sizes, ranks):
    owner = owners([Unit(str(i), "router", size) for i, size in enumerate(sizes)], 1, ranks)
    assert (np.diff(owner) >= 0).all() and owner.min() >= 0 and owner.max() < ranks
    loads = np.bincount(owner, sizes, ranks)
    assert loads.max() <= sum(sizes) / ranks + 2 * max(sizes)
