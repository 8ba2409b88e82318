"""Who trains whom in a round, on tiny numbers; and a round that goes on with other groups."""

from dataclasses import replace
from types import SimpleNamespace

from tests.support import tiny
from ubsmoe_ds.federation.roster import Amount, Roster
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
    assert sorted(client for turns in found.schedule(1) for client in turns) == [0, 1, 2]
    assert sorted(client for turns in found.schedule(2) for client in turns) == [0, 1, 2, 3]


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
