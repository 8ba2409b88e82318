"""Which clients a group trains in a round, with a clock and requests to stop made up."""

from types import SimpleNamespace
from typing import Any

import pytest

from ubsmoe_ds.client.engine import LocalProgress
from ubsmoe_ds.federation import training as module
from ubsmoe_ds.federation.training import GroupTraining

STEPS = 3.0  # seconds that a client's local steps take


class Group(GroupTraining):
    """A group whose clients only take time."""

    def become(self, client: int) -> None:
        self.current = client
        self.begun.append(client)

    def _train(self) -> None:
        self.local.steps += 4
        self.clock[0] += STEPS

    def end_turn(self) -> None:
        self.turns.done.append(SimpleNamespace(client=self.current, steps=self.local.steps))


@pytest.fixture
def group(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def turns_left(number: int, group: int, turns: Any) -> list[int]:
        return [client for client in (3, 1, 2) if client not in {turn.client for turn in turns}]

    exp = SimpleNamespace(takes_turns=True, train=SimpleNamespace(round_deadline_s=None))
    nothing: dict[str, Any] = dict.fromkeys(("texts", "rows", "hang_watch"))
    made = Group(
        aggregator=SimpleNamespace(exp=exp, world=SimpleNamespace(group=0, any_of_group=bool)),
        roster=SimpleNamespace(turns_left=turns_left),
        progress=SimpleNamespace(round=1),
        stop=SimpleNamespace(poll=lambda: False),
        current=3,
        own=3,
        **nothing,
    )
    made.begun, made.clock = [], clock
    return made


def trained(group: Group) -> list[tuple[int, int]]:
    return [(turn.client, turn.steps) for turn in group.turns.done]


def test_a_group_trains_its_clients_one_after_the_other(group):
    group.take_turns()
    assert trained(group) == [(3, 4), (1, 4), (2, 4)] and group.begun == [3, 1, 2]


def test_a_deadline_cuts_turns_that_have_not_begun(group):
    """After 3 s of 5 the second turn begins; after 6 s the third does not."""
    group.exp.train.round_deadline_s = 5.0
    group.take_turns()
    assert trained(group) == [(3, 4), (1, 4)]


def test_every_group_gives_one_turn(group):
    group.exp.train.round_deadline_s = 1.0
    group.take_turns()
    assert trained(group) == [(3, 4)]


def test_a_request_to_stop_leaves_the_turn_begun_and_it_goes_on(group):
    """Client 1 is stopped after four steps; the same process goes on with it, and does not begin it anew."""
    group.stop.poll = lambda: group.clock[0] == 2 * STEPS
    group.take_turns()
    assert trained(group) == [(3, 4)] and (group.current, group.local.steps) == (1, 4)
    group.take_turns()
    assert trained(group) == [(3, 4), (1, 8), (2, 4)] and group.begun == [3, 1, 2]


def test_a_turn_from_a_checkpoint_goes_on(group):
    """Client 1 had taken two steps when the job was stopped."""
    group.turns.done = [SimpleNamespace(client=3, steps=4)]
    group.begin = lambda client: LocalProgress(steps=2) if client == 1 else None
    group.take_turns()
    assert trained(group) == [(3, 4), (1, 6), (2, 4)]


def test_a_round_that_has_enough_clients_cuts_the_turn_and_those_to_come(group):
    """Of three, two are enough: the other group's turn finishes while client 1 has its second."""
    told = []
    group.finished = SimpleNamespace(tell=told.append, count=lambda number: 1 + (group.clock[0] >= 2 * STEPS))
    group.roster.enough, group.world.group_rank = lambda number: 2, 0
    group.progress.steps_taken = {3: 4, 1: 12}

    def train() -> None:
        Group._train(group)
        group.cut = group._enough_have_finished()

    group._train = train
    group.take_turns()
    assert trained(group) == [(3, 4)] and told == [1] and group.begun == [3, 1]
    assert group.progress.steps_taken == {3: 4, 1: 8} and group.local.steps == 0 and not group.cut
