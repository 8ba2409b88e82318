"""Clients on hosts: worked examples, comparison with exhaustive search, and refusals."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.launching.placement import describe, job_order, place


def client(name: str, ranks: int, expert_parallel: int = 1, hosts: list[str] | None = None) -> ClientConfig:
    return ClientConfig(name=name, budget=1.0, ranks=ranks, expert_parallel=expert_parallel, hosts=hosts)


@pytest.mark.parametrize(
    ("clients", "slots", "line"),
    [
        # placed in the order of the config, c would be on both hosts
        ([client("a", 1), client("b", 1), client("c", 2, 2), client("d", 2)], [3, 3], "n0: a 1, c 2; n1: b 1, d 2"),
        # filling the largest first would split the last client: 4 + 4, 3 + 3, 3, 3
        (
            [client(n, 4) for n in "ab"] + [client(n, 3) for n in "cdef"],
            [10, 10],
            "n0: a 4, c 3, d 3; n1: b 4, e 3, f 3",
        ),
        # one client must be on both hosts: the one without experts to exchange
        ([client("a", 2, 2), client("b", 2), client("c", 2, 2)], [3, 3], "n0: a 2, b 1; n1: b 1, c 2"),
        # larger than a host: split into whole expert-parallel groups
        ([client("a", 8, 4), client("b", 2)], [5, 5], "n0: a 4, b 1; n1: a 4, b 1"),
        ([client("a", 8, 8)], [4, 4], "n0: a 4; n1: a 4; expert parallelism of a crosses hosts"),
        # uneven hosts
        ([client("a", 6, 2), client("b", 2)], [2, 6], "n1: a 6; n0: b 2"),
        # pinned; the domain may be left out
        ([client("a", 2), client("b", 2, 1, ["n0"]), client("c", 2, 1, ["n0.site"])], [4, 2], "n1: a 2; n0: b 2, c 2"),
    ],
)
def test_worked_examples(clients, slots, line):
    dotted = any(c.hosts for c in clients)
    hosts = {f"n{n}.site" if dotted and n == 0 else f"n{n}": count for n, count in enumerate(slots)}
    assert describe(clients, place(clients, hosts)).replace(".site", "") == line


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), slots=st.lists(st.integers(1, 6), min_size=1, max_size=3)
)
@settings(max_examples=200, deadline=None)
def test_a_client_is_on_one_host_wherever_the_numbers_allow_it(sizes, slots):
    hosts = {f"n{n}": count for n, count in enumerate(slots)}
    clients = [client(f"c{n}", size) for n, size in enumerate(sizes)]
    if sum(sizes) > sum(slots):
        with pytest.raises(UserError, match="too few"):
            place(clients, hosts)
        return
    places = place(clients, hosts)
    assert [len(p) for p in places] == sizes
    used = Counter(host for p in places for host in p)
    assert all(used[host] <= hosts[host] for host in hosts)

    def goes(choice: tuple[str, ...]) -> bool:
        taken = Counter()
        for host, size in zip(choice, sizes, strict=True):
            taken[host] += size
        return all(taken[host] <= hosts[host] for host in hosts)

    possible = any(goes(choice) for choice in product(hosts, repeat=len(sizes)))
    assert possible == all(len(set(p)) == 1 for p in places)


def test_many_clients_are_placed_at_once():
    clients = [client(f"c{n}", 1 + n % 8, 1 + n % 8) for n in range(64)]  # 288 ranks
    places = place(clients, {f"n{n}": 8 for n in range(36)})
    assert all(len(set(p)) == 1 for p in places)


def test_ranks_are_numbered_by_client_wherever_they_were_started():
    """Ranks are started on two hosts in turn; each host gets a client of 2 ranks, so 0 2 and 1 3."""
    clients = [client("a", 2), client("b", 2)]
    assert job_order(place(clients, {"n0": 2, "n1": 2}), ["n0", "n1", "n0", "n1"]) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([client("a", 5)], r"need 5 ranks, the hosts have 4 slots \(n0 2, n1 2\): 1 too few"),
        ([client("a", 1, 1, ["n7"])], r"'a' has hosts 'n7', which is not among those of this job \(n0, n1\)"),
        ([client("a", 3, 1, ["n0"])], r"'a' needs 3 ranks, its hosts n0 have 2 slots"),
        ([client("a", 2, 1, ["n0"]), client("b", 1, 1, ["n0"])], r"'a' 2 on n0, 'b' 1 on n0"),
    ],
)
def test_what_cannot_be_placed_is_refused(clients, message):
    with pytest.raises(UserError, match=message):
        place(clients, {"n0": 2, "n1": 2})


@pytest.mark.parametrize(("pinned", "host"), [("n1", "n1.site"), ("n1.site", "n1"), ("n1.site", "n1.site")])
def test_a_domain_may_be_left_out(pinned, host):
    assert place([client("a", 1, 1, [pinned])], {"n0.site": 1, host: 1}) == [[host]]


@pytest.mark.parametrize(
    ("pinned", "hosts", "message"),
    [
        ("gpu1", ["gpu1.campus", "gpu1.clinic"], "'gpu1', which may be any of gpu1.campus, gpu1.clinic"),
        ("gpu1", ["gpu1", "gpu1#2"], "'gpu1', which may be any of gpu1, gpu1#2"),
        ("10", ["10.0.0.1", "10.0.0.2"], "'10', which is not among"),
    ],
)
def test_a_name_of_several_hosts_is_refused(pinned, hosts, message):
    """The site's data may exist only on that host."""
    with pytest.raises(UserError, match=message):
        place([client("a", 1, 1, [pinned])], dict.fromkeys(hosts, 1))


@given(data=st.data(), slots=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_pinned_clients_are_placed_wherever_they_can_be(data, slots):
    """A placement exists if no set of hosts is the only choice of more ranks than it has slots (Hall's theorem)."""
    hosts = {f"n{n}": count for n, count in enumerate(slots)}
    pins = st.lists(st.sampled_from(list(hosts)), min_size=1, unique=True)
    shapes = data.draw(
        st.lists(st.tuples(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]), pins), min_size=1, max_size=3)
    )
    clients = [client(f"c{n}", ranks, ep, pinned) for n, ((ranks, ep), pinned) in enumerate(shapes)]
    subsets = [
        [host for host, inside in zip(hosts, choice, strict=True) if inside]
        for choice in product([0, 1], repeat=len(hosts))
    ]
    possible = all(
        sum(c.ranks for c in clients if set(c.hosts) <= set(subset)) <= sum(hosts[host] for host in subset)
        for subset in subsets
    )
    try:
        places = place(clients, hosts)
    except UserError:
        assert not possible
        return
    assert possible
    assert all(set(p) <= set(c.hosts) and len(p) == c.ranks for p, c in zip(places, clients, strict=True))
    used = Counter(host for p in places for host in p)
    assert all(used[host] <= hosts[host] for host in hosts)


def test_very_many_clients_are_placed():
    places = place([client(f"c{n}", 1) for n in range(2000)], {f"n{n}": 8 for n in range(250)})
    assert max(Counter(host for p in places for host in p).values()) == 8


def test_another_domain_is_another_host():
    with pytest.raises(UserError, match="'n1.here', which is not among those"):
        place([client("a", 1, 1, ["n1.here"])], {"n1.there": 1})
