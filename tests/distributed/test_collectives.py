"""Gathering of small facts among ranks, and files that those of a host share."""

import json

import numpy as np

from tests.support.mpi_scenarios import part_of
from tests.support.ranks import run_ranks
from ubsmoe_ds.mpi.world import GATHERED_BYTES


def test_ranks_gather_values_of_different_lengths(tmp_path):
    """Rank r's value stands at position r on every rank, however long the others are."""
    lengths = [5, 0, 40_000]
    for rank in run_ranks(tmp_path, 3, "tests.support.mpi_scenarios:gathered", {"lengths": lengths}):
        assert rank["ranks"].tolist() == [0, 1, 2]
        assert rank["lengths"].tolist() == lengths
        assert np.array_equal(rank["thirds"], np.arange(3) / 3), "floats arrive bit for bit"


def test_ranks_have_the_same_bits_of_a_sum(tmp_path):
    """Small ones, which each rank sums for itself in the order of the ranks, and one that MPI sums."""
    sizes = [1, 1000, GATHERED_BYTES // 8]
    ranks = run_ranks(tmp_path, 3, "tests.support.mpi_scenarios:summed", {"sizes": sizes})
    for size in sizes:
        first, second, third = (part_of(rank, size) for rank in range(3))
        for rank in ranks:
            np.testing.assert_array_equal(rank[str(size)], ranks[0][str(size)])
            np.testing.assert_allclose(rank[str(size)], first + second + third, rtol=1e-12, atol=1e-14)
    assert (ranks[0]["1000"] == (part_of(0, 1000) + part_of(1, 1000)) + part_of(2, 1000)).all()


def test_ranks_of_a_host_share_one_file_of_rows(tmp_path):
    """Three ranks on two hosts: one of each host writes, both of the first map the same file, and no name is left."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "scratch"
    rows.write_text("".join(json.dumps({"text": f"the number {n} is not {n + 1}"}) + "\n" for n in range(300)))
    folder.mkdir()
    arguments = {"source": str(rows), "hosts": ["n0", "n1", "n0"], "folder": str(folder)}
    ranks = run_ranks(tmp_path, 3, "tests.support.mpi_scenarios:shared_rows", arguments)
    assert [int(rank["wrote"]) for rank in ranks] == [1, 1, 0]
    files = [rank["inodes"].tolist() for rank in ranks]
    assert files[0] == files[2] != files[1] and len(files[0]) == 1
    assert len({rank["digest"].tobytes() for rank in ranks}) == 1 and not list(folder.iterdir())
