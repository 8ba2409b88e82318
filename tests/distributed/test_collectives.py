"""Gathering of small facts among ranks."""

import numpy as np

from tests.support.ranks import run_ranks


def test_ranks_gather_values_of_different_lengths(tmp_path):
    """Rank r's value stands at position r on every rank, however long the others are."""
    lengths = [5, 0, 40_000]
    for rank in run_ranks(tmp_path, 3, "tests.support.mpi_scenarios:gathered", {"lengths": lengths}):
        assert rank["ranks"].tolist() == [0, 1, 2]
        assert rank["lengths"].tolist() == lengths
        assert np.array_equal(rank["thirds"], np.arange(3) / 3), "floats arrive bit for bit"
