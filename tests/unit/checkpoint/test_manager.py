"""When a checkpoint is due, by a table made by hand."""

from types import SimpleNamespace
from unittest import mock

import pytest

from tests.support import tiny
from ubsmoe_ds.checkpoint import manager as module
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.client.engine import LocalProgress, LocalStats

ROUNDS = 5


def manager(every: int) -> CheckpointManager:
    exp = tiny.experiment("unused", [{"budget": 0.5}], train={"rounds": ROUNDS}, checkpoint={"every": every})
    return CheckpointManager(exp, mock.Mock(), data_digest="")


# every -> complete rounds after which a checkpoint is due: its multiples and the last round, never round 0
DUE = {0: [], 1: [1, 2, 3, 4, 5], 2: [2, 4, 5], 3: [3, 5], 5: [5], 9: [5]}


@pytest.mark.parametrize("every", DUE)
def test_due_rounds(every):
    checkpoints = manager(every)
    complete = range(-1, ROUNDS + 1)  # -1: before the evaluation of round 0
    assert [c for c in complete if checkpoints.is_due(Progress(round=c + 1))] == DUE[every]


def test_a_saved_round_is_not_due_again_and_the_next_one_is():
    checkpoints = manager(2)
    checkpoints.note_saved(Progress(round=3))  # round 2 is complete
    assert not checkpoints.is_due(Progress(round=3))
    assert checkpoints.is_due(Progress(round=5))
    others = checkpoints.among(checkpoints.exp, mock.Mock())  # after a death
    assert not others.is_due(Progress(round=3)) and others.is_due(Progress(round=5))


def test_after_a_death_groups_keep_their_numbers_in_checkpoints(monkeypatch):
    """Of three groups g1 (two ranks) has died, and with it c0, which it alone may train. g2 has given c2 a turn."""
    groups = [{}, {"ranks": 2}, {"ranks": 2, "expert_parallel": 2}]
    exp = tiny.experiment("unused", [{"budget": 0.5, "groups": ["g1"]}, *[{"budget": 0.5}] * 2], groups=groups)
    monkeypatch.setattr(module, "gather_json", lambda comm, value: [[], value])
    world = mock.Mock(group=1, group_rank=0)
    left = CheckpointManager(exp, mock.Mock(), "").among(exp.without([1]), world)
    turn = SimpleNamespace(client=2, slot=0, update=0, stats=LocalStats(0, 0, 0, 0, 0, 0, 3, 1), seconds=2.0)
    server, progress = mock.Mock(lora_ranks=[3, 3, 3]), Progress(round=2, steps_taken={0: 4, 1: 4, 2: 8})
    entries = left._clients(mock.Mock(), server, progress, LocalProgress(), SimpleNamespace(done=[turn]))
    found = {name: (e["group"], e["turn"], e["layout"], e["steps_taken"]) for name, e in entries.items()}
    assert found == {"c0": (0, "", [1, 1], 4), "c1": (0, "", [1, 1], 4), "c2": (2, "done", [2, 2], 8)}
