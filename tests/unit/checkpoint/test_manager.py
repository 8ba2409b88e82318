"""When a checkpoint is due, by a table made by hand."""

from unittest import mock

import pytest

from tests.support import tiny
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress

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
