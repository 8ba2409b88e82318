"""Which clients are left out of a merge: by hand, and as a rule for any norms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.aggregation.screening import excess

NORMS = st.lists(st.floats(0.1, 10.0), min_size=2, max_size=9)


@pytest.mark.parametrize(
    ("norms", "work", "left_out"),
    [
        ([1.0, 2.0, 3.0], [1, 1, 1], []),
        ([1.0, 2.0, 25.1], [1, 1, 1], [2]),  # the others' median is 1.5: at most 15
        ([1.0, 1e12], [1, 1], [1]),  # for the first the others' median is 1e12
        ([1.0, 1.0, 1e12, 1e12, 1.0], [1, 1, 1, 1, 1], [2, 3]),
        ([5.0, 5.0, 9.0], [1, 1, 0.1], [2]),  # 9 in a tenth of the work is 90: over 50
        ([5.0, 0.5, 0.5], [1, 0.1, 0.1], []),
        ([0.0, 0.0, 7.0], [0, 0, 1], []),  # the others sat the round out: nothing to compare with
        ([0.0, 0.0, 7.0], [1, 1, 1], []),  # nor with updates of zero
        ([1.0, np.nan, np.inf, 10.5], [1, 1, 1, 1], [3]),  # NaN and Inf are refused elsewhere, and do not count
        ([1e12], [1], []),
    ],
)
def test_by_hand_at_a_factor_of_ten(norms, work, left_out):
    assert np.flatnonzero(excess(np.array(norms), np.array(work, dtype=float)) > 10).tolist() == left_out


def test_ratios_by_hand():
    """Medians of the others: 2.5, 2, 1.5; the fourth does not count."""
    np.testing.assert_allclose(excess(np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 1.0, 1.0, 0.0])), [0.4, 1, 2, 0])


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(0.1, 10.0), st.sampled_from([0.0, 1.0, np.nan, np.inf])),
            st.sampled_from([0.0, 0.5, 1.0]),
        ),
        max_size=9,
    )
)
def test_it_is_the_plain_loop_of_its_definition(clients):
    expected = []
    for place, (norm, work) in enumerate(clients):
        others = [n / w for other, (n, w) in enumerate(clients) if other != place and w > 0 and np.isfinite(n)]
        median = np.median(others) if others else 0.0
        expected.append(norm / work / median if work > 0 and np.isfinite(norm) and median > 0 else 0.0)
    found = excess(np.array([norm for norm, _ in clients]), np.array([work for _, work in clients]))
    np.testing.assert_array_equal(found, expected)


@given(NORMS, st.integers(0, 8), st.floats(1e-3, 1e3))
def test_one_huge_update_is_left_out_alone_whatever_the_unit(norms, place, unit):
    """Norms of the others differ by at most 100, so at a factor of 101 none of them is left out."""
    place %= len(norms)
    norm_C = np.array(norms)
    norm_C[place] = 1e12
    assert np.flatnonzero(excess(unit * norm_C, np.ones(len(norms))) > 101).tolist() == [place]
