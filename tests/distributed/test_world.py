"""How ranks are numbered, share cores and meet, over real MPI ranks."""

import pytest

from tests.support.ranks import run_ranks


def test_ranks_share_the_cores_that_they_may_run_on(tmp_path):
    """Rank 0 may run on cores 0 - 7, rank 1 on 0 - 3, rank 2 on core 9 alone, rank 3 on 0 - 3 and 10 - 11."""
    sets = [[*range(8)], [*range(4)], [9], [*range(4), 10, 11]]
    ranks = run_ranks(tmp_path, 4, "tests.support.mpi_scenarios:fair_cores", {"sets": sets})
    assert [int(rank["cores"]) for rank in ranks] == [5, 1, 1, 3]  # 4/3 + 4, 4/3, 1, 4/3 + 2


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Four ranks started on two hosts in turn, as by `-ppn 1`; client a has two ranks, b and c have one."""
    return run_ranks(tmp_path_factory.mktemp("joined"), 4, "tests.support.mpi_scenarios:joined", {})


def test_ranks_are_numbered_by_clients_wherever_they_were_started(joined):
    """Client a is on one host although its ranks were not started one after the other."""
    assert [(int(r["rank"]), int(r["client"]), int(r["group_rank"])) for r in joined] == [
        (0, 0, 0),
        (2, 1, 0),
        (1, 0, 1),
        (3, 2, 0),
    ]
    ports = [int(r["port"]) for r in joined]
    assert ports[0] == ports[2] > 0 and ports[1] == ports[3] == 0, "a client of one rank opens no port"


def test_ranks_that_see_devices_of_their_own_do_not_count_as_sharing(joined):
    """Two ranks see the same two devices, and two see one each; then the first two share one, which is too few."""
    assert [int(rank["local_of_two"]) for rank in joined] == [0, 0, 1, 0]
    assert [int(rank["local_of_one"]) for rank in joined] == [-1, 0, -1, 0]


def test_a_client_on_several_hosts_meets_where_all_its_ranks_have_been(joined):
    assert len({(str(r["address"]), int(r["meeting_port"])) for r in joined}) == 1
    assert not str(joined[0]["address"]).startswith("127."), "no other host reaches a loopback address"
    assert all(str(r["interface"]) for r in joined)


def test_hosts_that_do_not_reach_each_other_are_reported(joined):
    """The only allowed interface does not exist, so there is no address to try."""
    for rank in joined:
        assert str(rank["error"]).startswith("rendezvous: no address of the client's first host (it has none)")
        assert "GLOO_SOCKET_IFNAME" in str(rank["error"])
