"""Gathering of small facts, on one rank; tests/distributed/test_collectives.py has several."""

import pytest
from mpi4py import MPI

from ubsmoe_ds.mpi.collectives import gather_json


@pytest.mark.parametrize("value", [None, "", [1, {"key": ["é", 0.1]}], "x" * 100_000])
def test_a_value_comes_back_as_it_was_given(value):
    assert gather_json(MPI.COMM_SELF, value) == [value]


def test_what_json_has_no_word_for_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        gather_json(MPI.COMM_SELF, {1, 2})
