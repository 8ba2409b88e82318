"""What a round does when the job is asked to stop, without ranks."""

from types import SimpleNamespace

import pytest

from ubsmoe_ds.base.errors import Preempted
from ubsmoe_ds.client.turn import Turns
from ubsmoe_ds.federation.rounds import Federation


@pytest.mark.parametrize("takes_turns", [False, True])
@pytest.mark.parametrize("asked_here", [False, True])
def test_a_round_that_is_stopped_is_saved_as_it_is(takes_turns, asked_here):
    """A client of its own group that is asked itself reads no batches for a turn that nobody will merge."""
    done, seen = Turns(done=["a turn"]), []

    def end_turn() -> None:
        seen.append("end of turn")
        training.turns = Turns(done=["all steps"])

    def save_and_stop() -> None:
        seen.append(training.turns.done)
        raise Preempted("saved")

    def merge(turns: Turns, cohort: list[int], stop: bool) -> None:
        assert stop == asked_here  # where it is another rank, that one says so

    training = SimpleNamespace(turns=done, end_turn=end_turn, roster=SimpleNamespace(cohort=lambda number: [0]))
    federation = SimpleNamespace(
        stopwatch=SimpleNamespace(lap=lambda stage: None),
        progress=SimpleNamespace(round=3),
        training=training,
        hang_watch=SimpleNamespace(enter=lambda stage: None),
        world=SimpleNamespace(any_of_group=lambda flag: flag),
        stop=SimpleNamespace(poll=lambda: asked_here),
        exp=SimpleNamespace(takes_turns=takes_turns),
        aggregator=SimpleNamespace(merge=merge),
        _save_and_stop=save_and_stop,
    )
    with pytest.raises(Preempted):
        Federation._merge(federation)
    if takes_turns:
        assert seen == [["a turn"]]
    else:
        assert seen == ([[]] if asked_here else ["end of turn", []])
