"""Laps of the stopwatch, by a clock that shows the seconds it is told."""

import time

import pytest

from ubsmoe_ds.base.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.perf_counter` returns, one a call."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: seconds.pop(0))
    return seconds


def test_laps_of_a_stage_add_up_and_no_moment_is_lost(clock):
    clock += [100.0, 102.0, 107.0, 107.5, 110.0]
    stopwatch = Stopwatch()
    assert [stopwatch.lap(stage) for stage in ("wait", "exchange", "wait", "merge")] == [2.0, 5.0, 0.5, 2.5]
    assert stopwatch.seconds == {"wait": 2.5, "exchange": 5.0, "merge": 2.5}
    assert sum(stopwatch.seconds.values()) == 110.0 - 100.0


def test_start_drops_the_time_since_the_last_lap_and_keeps_the_sums(clock):
    clock += [0.0, 3.0, 50.0, 51.0]
    stopwatch = Stopwatch()
    stopwatch.lap("exchange")
    stopwatch.start()
    stopwatch.lap("evaluation")
    assert stopwatch.seconds == {"exchange": 3.0, "evaluation": 1.0}


def test_reset_forgets_all_stages_and_begins_a_lap(clock):
    clock += [0.0, 3.0, 50.0, 52.0]
    stopwatch = Stopwatch()
    stopwatch.lap("local")
    stopwatch.reset()
    assert stopwatch.seconds == {} and stopwatch.seconds["local"] == 0.0  # a stage without a lap took no time
    assert stopwatch.lap("local") == 2.0
    assert stopwatch.seconds == {"local": 2.0}
