"""Values with and without NaN and Inf, as `isfinite` sees them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.client.finite import all_finite


@given(st.lists(st.floats(width=32), max_size=9))
def test_all_finite_is_what_isfinite_says(values):
    values_N = torch.tensor(values, dtype=torch.float32)
    assert all_finite(values_N) == bool(torch.isfinite(values_N).all())
