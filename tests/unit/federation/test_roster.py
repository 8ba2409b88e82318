"""Who trains whom in a round, on tiny numbers; and a round that goes on with other groups."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny
from ubsmoe_ds.base.errors import TooFewClients
from ubsmoe_ds.federation.roster import Amount, Lost, Roster
from ubsmoe_ds.models.cost import ModelShape

SHAPE = ModelShape(
    layers=2, hidden=16, expert_width=12, num_experts=8, heads=2, kv_heads=2, head_dim=8, vocab=61, lora_rank=3
)


def roster(groups: list[dict], own: list[Amount] | None = None, groups_of: dict | None = None, **sections) -> Roster:
    clients: list[dict] = [{"budget": budget} for budget in (0.25, 1.0, 0.5, 0.75)]
    for client, names in (groups_of or {}).items():
        clients[client]["groups"] = names
    exp = tiny.experiment("unused", clients, groups=groups, **sections)
    return Roster(exp, SHAPE, [Amount(10, 100)] * 4, own or [Amount(0, 0)] * 4)


def test_the_largest_budgets_come_first():
    """K = 1, 4, 2, 3: the first two places go to c1 and c3, then c2 to c3's group; c0 to where it is done first."""
    found = roster([{"count": 2}])
    assert [turns[0] for turns in found.schedule(1)] == [1, 3]
    assert sorted(client for turns in found.schedule(1) for client in turns) == [0, 1, 2, 3]
    assert "g0: c1" in found.line(1) and "round 1" in found.line(1)
    idle, over = found.idle(1)
    assert 0 <= idle < 0.5 and 1 <= over < 1.34


def test_measured_speed_changes_the_next_round_and_never_the_current_one():
    """The second group takes five times as long for its FLOPs: from round 2 on it gets the smallest client alone."""
    found = roster([{"count": 2}], train={"schedule_by": "measured"})
    now = found.schedule(1)
    found.note_seconds([client for turns in now for client in turns], [0, 0, 1, 1], [1.0, 1.0, 5.0, 5.0])
    assert found.schedule(1) == now and found.schedule(2)[1] == [0]


def test_done_turns_are_not_given_again():
    found = roster([{"count": 2}])
    whole = found.schedule(1)
    turns = [SimpleNamespace(client=whole[0][0])]
    assert found.turns_left(1, 0, turns) == whole[0][1:]
    found.note_done(1, {whole[0][0]: 0})  # the same groups: each goes on with its own list
    assert found.schedule(1) == whole


def test_with_other_groups_the_rest_is_dealt_anew():
    """c3 was done on the second of two groups; now there are three, and the last one answers for it."""
    found = roster([{"count": 3}])
    done = {3: 2} if 3 not in found.schedule(1)[2] else {3: 0}
    found.note_done(1, done)
    group = done[3]
    assert found.cohort(1) == [0, 1, 2, 3] and found.schedule(1)[group][0] == 3
    assert sorted(client for turns in found.schedule(1) for client in turns) == [0, 1, 2, 3]
    assert 3 not in found.turns_left(1, group, [SimpleNamespace(client=3)])
    assert found.schedule(2)[group][0] != 3 and found.cohort(2) == [0, 1, 2, 3]


def lose(found: Roster, lost: list[int], number: int | None) -> Lost:
    return found.lose(found.exp.without(lost), lost, number)


def test_the_clients_of_a_dead_group_are_out_of_the_round_alone():
    """Three groups: c1; c3; c2 and c0. The second dies in round 1, then the third: c3, c0 and c2 are out of it."""
    found = roster([{"count": 3}])
    assert found.schedule(1) == [[1], [3], [2, 0]]
    assert lose(found, [1], 1) == Lost(["g1"], [], ["c3"])
    assert found.schedule(1) == [[1], [2, 0]] and found.cohort(1) == [0, 1, 2] and found.numbers == [0, 2]
    assert found.out(1) == [3] and found.cohort(2) == [0, 1, 2, 3] and found.out(2) == []
    assert found.turns_left(1, 1, [SimpleNamespace(client=2)]) == [0]
    assert sorted(map(len, found.schedule(2))) == [2, 2]
    assert lose(found, [1], 1) == Lost(["g2"], [], ["c0", "c2"])
    assert found.schedule(1) == [[1]] and found.out(1) == [3, 0, 2] and found.numbers == [0]
    assert "g0: c1 (" in found.line(1) and found.schedule(2)[0][0] == 1


def test_after_the_merge_nobody_is_out():
    found = roster([{"count": 2}])
    assert lose(found, [0], None) == Lost(["g0"], [], []) and found.out(1) == []
    assert sorted(found.schedule(2)[0]) == [0, 1, 2, 3] and found.numbers == [1]


def test_a_round_of_which_nobody_is_left_is_dealt_anew():
    """One client a round: whoever had it dies, and another group trains it."""
    found = roster([{"count": 3}], sampling={"clients": 1})
    (cohort,) = [found.cohort(4)]
    group = next(g for g, clients in enumerate(found.schedule(4)) if clients)
    assert lose(found, [group], 4).out == [] and found.cohort(4) == cohort
    assert sum(found.schedule(4), []) == cohort and found.out(4) == []


def test_a_client_of_one_group_is_lost_with_it():
    """c1 may use g1 alone. It is out of round 1 and of all that follow; two of the three others are drawn."""
    clients = [{"budget": 0.5}, {"budget": 0.5, "groups": ["g1"]}, {"budget": 0.5}, {"budget": 0.5}]
    exp = tiny.experiment("unused", clients, groups=[{}, {}], sampling={"clients": 3})
    found = Roster(exp, SHAPE, [Amount(10, 100)] * 4, [Amount(0, 0)] * 4)
    number = next(n for n in range(1, 20) if 1 in found.cohort(n))
    with_it = found.schedule(number)[1]
    gone = lose(found, [1], number)
    assert gone == Lost(["g1"], ["c1"], [f"c{client}" for client in sorted(with_it)])
    assert all(found.cohort(n) == [0, 2, 3] for n in range(number + 1, number + 9))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_deaths_cost_turns_and_no_clients(data):
    """Groups die one after the other in round 1, until one is left: nobody is trained twice, or where it may not be."""
    names = [f"g{number}" for number in range(data.draw(st.integers(2, 4)))]
    allowed = st.one_of(st.none(), st.lists(st.sampled_from(names), min_size=1, unique=True))
    clients = [
        {"budget": b, "groups": data.draw(allowed)}
        for b in data.draw(st.lists(st.sampled_from([0.25, 1.0]), max_size=7))
    ]
    clients += [{"budget": 0.5}]  # so that nobody's group is without clients
    exp = tiny.experiment("unused", clients, groups=[{}] * len(names))
    found = Roster(exp, SHAPE, [Amount(9, 9)] * len(clients), [Amount(0, 0)] * len(clients))
    while len(found.exp.trainers) > 1:
        lost = data.draw(st.integers(0, len(found.exp.trainers) - 1))
        turns, missing = found.schedule(1), found.out(1)
        kept = turns[:lost] + turns[lost + 1 :]
        gone = lose(found, [lost], 1)
        if any(kept):
            assert found.schedule(1) == kept and sorted(found.out(1)) == sorted([*missing, *turns[lost]])
            assert gone.out == [found.exp.clients[client].name for client in sorted(turns[lost])]
        left = found.exp.clients_left
        for number in (1, 2) if not any(kept) else (2,):
            whole = found.schedule(number)
            assert sorted(client for part in whole for client in part) == left == found.cohort(number)
            assert all(group in found.exp.allowed_groups(c) for group, part in enumerate(whole) for c in part)
        assert [names[number] for number in found.numbers] == [group.name for group in found.exp.trainers]
    assert len(clients) - 1 in found.cohort(2)  # the last one may use any group


def test_a_sampled_client_with_a_group_of_its_own_is_lost_with_it():
    exp = tiny.experiment("unused", [{"budget": 0.5}] * 4, sampling={"clients": 3})
    found = Roster(exp, SHAPE, [Amount(10, 100)] * 4, [Amount(0, 0)] * 4)
    lost = found.cohort(1)[0]
    name, others = exp.clients[lost].name, found.cohort(1)[1:]
    assert lose(found, [lost], 1) == Lost([name], [], [])
    assert found.cohort(1) == others and found.out(1) == [lost]
    assert found.cohort(2) == [client for client in range(4) if client != lost]


def test_a_round_for_which_nobody_is_left_ends_the_job(tmp_path):
    """Round 3 has c1 alone, whose only group dies in round 2."""
    path = tmp_path / "there.json"
    path.write_text(json.dumps({"c0": [[1, 2]]}))
    clients = [{"budget": 0.5}, {"budget": 0.5, "groups": ["g1"]}]
    sampling = {"clients": 2, "by": "availability", "availability": str(path)}
    exp = tiny.experiment("unused", clients, groups=[{}, {}], sampling=sampling, train={"rounds": 3})
    found = Roster(exp, SHAPE, [Amount(10, 100)] * 2, [Amount(0, 0)] * 2)
    lose(found, [1], 2)
    assert found.cohort(2) == [0]
    with pytest.raises(TooFewClients, match=r"sampling\.availability: no client that is left is there in round 3"):
        found.schedule(3)


def test_without_groups_each_client_has_its_own():
    exp = tiny.experiment("unused", [{"budget": 0.5}] * 3)
    found = Roster(exp, replace(SHAPE), [Amount(10, 100)] * 3, [Amount(0, 0)] * 3)
    assert found.cohort(1) == [0, 1, 2] and found.schedule(1) == [[0], [1], [2]]
    assert [found.evaluated_by(group) for group in range(3)] == [[0], [1], [2]]


def test_own_rows_are_evaluated_by_one_group_each_the_most_work_first():
    """Rows of ten tokens: c0 has 90, c1 none, c2 3, c3 4. c0 is more work than the others together, at any K."""
    own = [Amount(90, 900), Amount(0, 0), Amount(3, 30), Amount(4, 40)]
    found = roster([{"count": 2}], own)
    assert [found.evaluated_by(group) for group in range(2)] == [[0], [3, 2]]
    bound = roster([{"name": "a"}, {"name": "b"}], own, groups_of={0: ["b"]})
    assert [bound.evaluated_by(group) for group in range(2)] == [[3, 2], [0]]


def test_a_schedule_by_measured_speed_gives_a_slow_group_less():
    """g0 took 8 times as long for the same work: by speed 1 : 8 the four clients go to g1, and g0 gets none or one."""
    found = roster([{"count": 2}], train={"schedule_by": "measured"})
    even = roster([{"count": 2}]).schedule(1)
    assert found.schedule(1) == even  # nothing is measured yet
    found.note_seconds([1, 1], [0, 1], [8.0, 1.0])
    assert len(found.schedule(2)[0]) <= 1 and len(found.schedule(2)[1]) >= 3
    costs = found.costs([1])[1]
    assert costs[0] == pytest.approx(8.0) and costs[1] == pytest.approx(1.0)  # seconds of the same turn again
    again = roster([{"count": 3}], train={"schedule_by": "measured"})
    again.measured = json.loads(json.dumps(found.measured))
    assert again.costs([1])[1][2] == pytest.approx(8 / 4.5)  # a group that is new has the mean of the speeds 1 and 8
