"""A rank that hangs is noticed, by its watcher; one that works or waits for others is left alone."""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ranks import REPO, clean_environment
from ubsmoe_ds.launching.hang_watcher import OVERDUE, WORKS, Look, Rule, Watcher, is_waiting
from ubsmoe_ds.launching.progress_record import (
    FLAG,
    OTHERS_WAIT_AT,
    PROGRESS,
    STAGE_BYTES,
    STAGE_END,
    WAITS_AT,
    Peer,
    do_all_wait,
)
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS, read_code
from ubsmoe_ds.mpi.collectives import wait_quietly

TIMEOUT = 10.0  # seconds of a clock that the tests move


def seconds_until_overdue(looks, passed=1.0) -> float | None:
    """Return when the rule finds a rank overdue that looks like this, one look every `passed` seconds."""
    rule = Rule(TIMEOUT, 1.0, next(looks))
    for number, look in enumerate(looks, start=1):
        verdict = rule.judge(passed, look)
        if verdict == OVERDUE:
            return number * passed
        if verdict == WORKS:
            rule.start_anew(look)
    return None


def looks(number=40, *, counted=True, state="S", cpu=0.0, moved=0, events=lambda second: 0):
    """Yield what a rank shows that uses `cpu` seconds, moves `moved` bytes in a second and has noted `events`."""
    return (Look(events(s), counted, state, cpu * s, moved * s) for s in range(number))


# name: (what shows, the second at which it is noticed)
CASES = {
    "a step that does not end": (looks(), 11),
    "though it works": (looks(cpu=1.0, moved=2**30, state="R"), 11),
    "after two steps of 4 s": (looks(events=lambda s: min(s // 4, 2)), 8 + 11),
    "steps of 10 s": (looks(events=lambda s: s // 10), None),
    "a stage in which nothing happens": (looks(counted=False), 11),
    "a stuck file system": (looks(counted=False, state="D"), 11),
    "a stage with some work": (looks(counted=False, cpu=0.002), None),
    "less than a rank that waits": (looks(counted=False, cpu=0.001), 11),
    "a stage that reads a megabyte in 10 s": (looks(counted=False, moved=2**20 // 10), None),
    "a stopped rank": (looks(state="T"), 11),
    "a stopped rank in a stage with some work": (looks(counted=False, state="T", cpu=0.002), 11),
    "a debugger": (looks(state="t"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_when_a_rank_counts_as_one_that_hangs(name):
    """The limit is 10 s, so the look at second 11 is the first beyond it."""
    shown, noticed = CASES[name]
    assert seconds_until_overdue(shown) == noticed


def test_a_rank_that_was_stopped_for_a_moment_is_none_that_hangs():
    """It has waited for long, and is continued before the limit has passed."""
    rule = Rule(TIMEOUT, 1.0, Look(0, False, "S", 0.0, 0))
    for second in range(1, 10):
        assert rule.judge(1.0, Look(0, False, "S", 0.0, 0)) is None, second
    for second in range(10, 20):
        assert rule.judge(1.0, Look(0, False, "T", 0.0, 0)) is None, second


def test_a_watcher_that_was_suspended_itself_has_seen_nothing():
    """An hour counts as two looks: after 10 s of silence it takes a look more."""
    assert seconds_until_overdue(looks(5), passed=3600.0) is None


@given(gaps=st.lists(st.integers(1, 10), max_size=20), counted=st.booleans(), state=st.sampled_from("SRD"))
def test_steps_within_the_limit_never_trip_it_and_the_next_silence_does(gaps, counted, state):
    steps = [number for number, gap in enumerate(gaps, start=1) for _ in range(gap)]
    silence = [len(gaps)] * (int(TIMEOUT) + 1)
    shown = (Look(events, counted, state, 0.0, 0) for events in [0, *steps, *silence])
    # an event shows in the first of its looks: the last gap's other looks belong to the silence
    assert seconds_until_overdue(shown) == len(steps) - (gaps[-1] - 1 if gaps else 0) + int(TIMEOUT) + 1


def stacks_now() -> str:
    """Return the stacks of this process's threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode()


def test_a_rank_waits_for_others_if_its_innermost_call_does():
    """By real stacks: with a thread in `wait_quietly`, and without. A request's `Test` is of C, as MPI's."""
    lock = threading.Lock()
    thread = threading.Thread(target=wait_quietly, args=[SimpleNamespace(Test=lock.locked)])
    thread.start()
    time.sleep(0.05)
    with_it = stacks_now()
    lock.acquire()
    thread.join()
    assert is_waiting(with_it) and not is_waiting(stacks_now()), with_it


MAIN = "Current thread 0x01 (most recent call first):"
IN_GLOO = '  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3 in all_reduce'
AT_WORK = '  File "/x/ubsmoe_ds/moe/layer.py", line 2 in forward'
HEARTBEAT = ["Thread 0x02 (most recent call first):", '  File "/x/ubsmoe_ds/mpi/heartbeat.py", line 1 in _listen']


@pytest.mark.parametrize(
    ("lines", "waits"),
    [
        ([MAIN, IN_GLOO, AT_WORK], True),
        (["Thread 0x02 (most recent call first):", IN_GLOO, MAIN, AT_WORK], True),  # backward on a GPU
        ([MAIN, AT_WORK, IN_GLOO], False),  # what a call that waits has called is work
        ([*HEARTBEAT, MAIN, AT_WORK], False),  # that one always waits
        ([], False),
    ],
)
def test_only_the_innermost_calls_count(lines, waits):
    assert is_waiting("\n".join(lines)) == waits


@pytest.mark.parametrize(("after", "left"), [(b"progress", False), (b"", True)], ids=["goes on", "ends"])
def test_a_rank_that_was_asked_and_goes_on_or_ends_does_not_hang(after, left, monkeypatch, capfd):
    """It does so while the watcher waits for its answer, and gives none."""
    watcher = Watcher.__new__(Watcher)
    watcher.pid, watcher.description, watcher.survives = -1, "a rank", True  # nobody to kill
    watcher.record, watcher.peers, watcher.all_waited = noted(0, 0), [], 0
    watcher.rule = Rule(TIMEOUT, 1.0, Look(0, True, "S", 0.0, 0))
    monkeypatch.setattr(Watcher, "_ask", lambda self: "")
    monkeypatch.setattr(Watcher, "_has_left", lambda self, seconds: left)
    monkeypatch.setattr(Watcher, "_read", lambda self: RECORD + after)
    assert watcher._hangs(OVERDUE, Look(0, True, "S", 0.0, 0), RECORD) == left
    assert capfd.readouterr().err == ""


def noted(events: int, flag: int) -> int:
    """Return a descriptor of what a rank has noted, and its watcher behind it."""
    descriptor = os.memfd_create("noted")
    os.pwrite(descriptor, PROGRESS.pack(events, 7, 1) + b"round 3, local step".ljust(STAGE_BYTES, b"\0"), 0)
    os.pwrite(descriptor, FLAG.pack(flag), WAITS_AT)
    os.pwrite(descriptor, FLAG.pack(0), OTHERS_WAIT_AT)
    return descriptor


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([(4, 5), (0, 1)], True),  # (events, flag of the watcher: 1 + events when it was found waiting)
        ([(4, 5), (0, 0)], False),  # the second works
        ([(5, 5), (0, 1)], False),  # the first has gone on since
        ([], False),  # nobody knows
    ],
)
def test_all_ranks_wait_if_each_was_found_so_and_has_not_gone_on(ranks, expected):
    peers = [(Peer(n, 0, f"rank {n}"), noted(*rank)) for n, rank in enumerate(ranks)]
    assert do_all_wait(peers) == expected


def test_a_job_on_several_hosts_waits_when_the_others_do(monkeypatch, capfd):
    """The first rank's watcher asks twice, so that a rank that was about to go on is not taken for one that waits."""
    watcher = Watcher.__new__(Watcher)
    watcher.pid, watcher.description, watcher.survives, watcher.all_waited = -1, "rank 0", True, 0
    watcher.record = noted(4, 0)
    watcher.hosts, watcher.peers = 2, [(Peer(1, 0, "rank 0"), watcher.record)]
    look = Look(4, True, "S", 0.0, 0)
    watcher.rule = Rule(TIMEOUT, 1.0, look)
    monkeypatch.setattr(Watcher, "_ask", lambda self: f"{MAIN}\n{IN_GLOO}\n")
    monkeypatch.setattr(Watcher, "_has_left", lambda self, seconds: False)
    record = os.pread(watcher.record, STAGE_END, 0)
    assert [watcher._hangs(WORKS, look, record) for _ in range(3)] == [False] * 3  # of the other host nobody knows
    os.pwrite(watcher.record, FLAG.pack(1), OTHERS_WAIT_AT)
    assert [watcher._hangs(WORKS, look, record) for _ in range(2)] == [False, True]
    line = capfd.readouterr().err.splitlines()[0]
    assert line == (
        "error: all ranks wait for one another: no progress for 20.0 s (hang_timeout_s 10); 2 hosts, here rank 0 in "
        "round 3, local step 7; its client is given up"
    )


RECORD = PROGRESS.pack(0, 0, 1)
LIMIT = 1.2  # seconds, of real processes
RANK = """
import os, signal, sys, threading, time
from types import SimpleNamespace
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.collectives import wait_quietly  # takes a while
watch = HangWatch("client 'a', rank 0 of 1", 1.2, survives=sys.argv[1] == "survives")
watch.enter("round 3, local step", counted_from=6)
watch.count()
LOCK = threading.Lock()
print(watch._watcher.pid, flush=True)
def stop():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): os.kill(watch._watcher.pid, number)
    os.kill(os.getpid(), signal.SIGSTOP)
def survives(): stop()
def lock():
    for _ in range(2): LOCK.acquire()
def steps():
    for _ in range(12):
        time.sleep(0.3)
        watch.count()
    os._exit(0)  # MPI takes its time
def waits():
    threading.Timer(3.6, LOCK.acquire).start()
    wait_quietly(SimpleNamespace(Test=LOCK.locked))
    os._exit(0)
globals()[sys.argv[1]]()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run processes that hang and others that do not, all at once; return name -> (code, output, watcher, folder)."""
    started = {}
    for name in ("stop", "survives", "lock", "steps", "waits"):
        folder = tmp_path_factory.mktemp(name)
        environment = clean_environment() | {"PYTHONPATH": str(REPO), PARENT_SPEAKS: str(folder)}
        command = [sys.executable, "-c", RANK, name]
        started[name] = (
            folder,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
        )
    results = {}
    for name, (folder, process) in started.items():
        output, _ = process.communicate(timeout=60)  # until the watcher, too, has closed it
        watcher, _, rest = output.partition("\n")
        results[name] = process.returncode, rest, int(watcher), folder
    return results


@pytest.mark.parametrize("name", ["stop", "survives"])
def test_a_stopped_rank_is_named_and_killed(name, ranks):
    """Signals that are meant for the whole job do not end the watcher."""
    code, output, _, folder = ranks[name]
    assert code == -signal.SIGKILL
    start, _, end = output.partition(" s in round 3, local step 7 (hang_timeout_s 1.2); process ")
    assert start.startswith("error: client 'a', rank 0 of 1 hangs: no progress for "), output
    assert LIMIT <= float(start.rpartition(" ")[2]) < 60 and "is stopped by a signal (state T)" in end
    assert output.count("\n") == 1
    # a job that survives deaths goes on, so nobody says that it ends
    assert read_code(folder) == (None if name == "survives" else 1)
    assert ("continue with --resume auto" in end) == (name != "survives")


def test_a_rank_that_lives_shows_its_stacks(ranks):
    code, output, _, folder = ranks["lock"]
    line, heading, frame, *_ = output.splitlines()
    assert (code, read_code(folder)) == (-signal.SIGKILL, 1) and "; process " in line and " lives (state S)" in line
    assert heading.endswith("(most recent call first):") and frame.endswith(" in lock"), output


@pytest.mark.parametrize("name", ["steps", "waits"])
def test_a_rank_that_is_slow_or_waits_for_others_is_left_alone(name, ranks):
    """Each lasts three times the limit."""
    code, output, _, folder = ranks[name]
    assert (code, output, read_code(folder)) == (0, "", None)


def test_no_watcher_is_left_behind(ranks):
    deadline = time.monotonic() + 20
    for _, _, watcher, _ in ranks.values():
        while time.monotonic() < deadline and os.path.exists(f"/proc/{watcher}/fd/0"):  # noqa: PTH110
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{watcher}/fd/0")  # noqa: PTH110


STARTING = """
import os, signal, sys, time
from ubsmoe_ds.launching import hang_watch
hang_watch.LEAST_SECONDS = 0.4
os.environ["PMI_RANK"] = sys.argv[2]
watch = hang_watch.StartWatch(float(sys.argv[3]), os.environ)
print("started", flush=True)
if sys.argv[1] == "closes": watch.close()
if sys.argv[1] == "stops": os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(float(sys.argv[4]))
"""
# what the rank does, its number, hang_timeout_s, seconds that it takes -> what is said when it is ended
STARTS = {
    "it is stopped": ("stops 1 0.1 0", "0.4 s (hang_timeout_s, at least 300): it hangs; "),
    "the first waits": ("waits 0 0.5 9", "0.5 s (hang_timeout_s, at least 300): it waits for ranks that hang or are "),
    "another waits longer, because the first speaks": ("waits 1 0.1 2.5", None),
    "another waits, and the first does not speak": ("waits 1 0.1 9", "0.4 s (hang_timeout_s, at least 300): it waits "),
    "they have met": ("closes 0 0.1 2.5", None),
    "the limit is longer": ("waits 0 60 2.5", None),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Run processes that start, all at once; return name -> (code, output, process, folder)."""
    started = {}
    for name, (arguments, *_) in STARTS.items():
        folder = tmp_path_factory.mktemp("start")
        command = [sys.executable, "-c", STARTING, *arguments.split()]
        environment = clean_environment() | {"PYTHONPATH": str(REPO), PARENT_SPEAKS: str(folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[name] = subprocess.Popen(command, env=environment, **pipes), folder
    # until the watcher, too, has closed it
    return {name: (process, process.communicate(timeout=60)[0], folder) for name, (process, folder) in started.items()}


@pytest.mark.parametrize("name", STARTS)
def test_a_rank_that_does_not_meet_the_others_is_ended(name, starts):
    """The limit is hang_timeout_s, but at least 0.4 s here."""
    process, output, folder = starts[name]
    arguments, said = STARTS[name]
    first, _, line = output.partition("\n")
    assert (first, process.returncode) == ("started", -signal.SIGKILL if said else 0)
    assert read_code(folder) == (1 if said else None)
    if said:
        assert line.startswith(f"error: rank {arguments.split()[1]} has not met the others in {said}"), line
        does = "is stopped by a signal (state T)" if name == "it is stopped" else "lives (state S)"
        assert f"; process {process.pid} on " in line and does in line and line.count("\n") == 1, line
    else:
        assert line == ""
