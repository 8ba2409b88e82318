"""The process that runs mpiexec speaks for ranks that cannot, and goes on whatever becomes of them."""

import os
import signal
import subprocess

import pytest

from ubsmoe_ds.launching import supervisor


@pytest.fixture
def supervising():
    """Return a supervisor of one rank, a process that sleeps; its signals are not for the tests."""
    result = supervisor.Supervisor.__new__(supervisor.Supervisor)
    with subprocess.Popen(["sleep", "60"]) as rank:
        result.process, result.ranks = rank, {os.pidfd_open(rank.pid): "client 'a', rank 0 of 1"}
        yield result
        rank.kill()


def test_a_stopped_rank_hears_that_it_is_asked_to_stop(supervising):
    """A stopped process gets a signal only once it goes on; the others would wait for it."""
    supervising.process.send_signal(signal.SIGSTOP)
    supervising._handle(signal.SIGTERM, None)
    assert supervising.process.wait(timeout=20) == -signal.SIGUSR1


def test_a_rank_that_cannot_be_killed_is_given_up(supervising, tmp_path, monkeypatch, capsys):
    """Such as one in a system call of a stuck file system: `--restarts` must go on without its end."""
    looks = []

    def look(self, folder):
        looks.append(folder)
        assert len(looks) < 10**6, "it waits for ever"

    for name in ("LEAVE_SECONDS", "KILLED_SECONDS"):
        monkeypatch.setattr(supervisor, name, 0.01)
    monkeypatch.setattr(supervisor.Supervisor, "_send", lambda self, number: None)
    monkeypatch.setattr(supervisor.Supervisor, "_look", look)
    supervising._end_what_is_left(tmp_path)
    assert capsys.readouterr().err.startswith("warning: client 'a', rank 0 of 1 was killed, but has not ended: ")
    assert not supervising.ranks


KILLED = ["client 'a', rank 0 of 1"]


@pytest.mark.parametrize(
    ("mpiexec", "signed_off", "dead", "code", "line"),
    [
        (0, 0, [], 0, ""),
        (0, 75, [], 75, ""),
        (255, 0, [], 0, "note: mpiexec ended with code 255 after the ranks had ended with 0\n"),  # its proxy was killed
        (-9, 75, [], 75, "note: mpiexec ended with code -9 after the ranks had ended with 75\n"),
        (7, 1, [], 1, ""),  # a rank has said why
        (9, None, KILLED, 1, "error: client 'a', rank 0 of 1 was killed\n"),
        (2, None, KILLED, 1, "error: client 'a', rank 0 of 1 was killed\n"),  # by SIGINT: no mistake of the user
        (-9, None, [], 137, "error: mpiexec was killed (signal 9); continue with --resume auto\n"),
        (-9, None, KILLED, 137, "error: mpiexec was killed (signal 9); continue with --resume auto\n"),
        (
            9,
            None,
            [],
            1,
            "error: mpiexec ended with code 9, and no rank has said why; see above\n",
        ),  # killed as it started
        (143, None, [], 143, ""),  # a second signal to a rank
        (2, None, [], 2, ""),  # a config that cannot be read on another host
        (0, None, KILLED, 1, "error: client 'a', rank 0 of 1 was killed\n"),  # Open MPI, after all have died
    ],
)
def test_the_code_is_that_of_the_ranks_if_they_have_said_one(mpiexec, signed_off, dead, code, line, capsys):
    result = supervisor.Supervisor.__new__(supervisor.Supervisor)
    result.interrupted = result.asked_to_stop = False
    result.seen = True
    assert result._judge(mpiexec, signed_off, dead) == code
    assert capsys.readouterr().err == line


def test_whoever_asked_for_the_end_is_not_told_of_it(capsys):
    result = supervisor.Supervisor.__new__(supervisor.Supervisor)
    result.interrupted, result.asked_to_stop, result.seen = False, True, True
    assert result._judge(-15, None, []) == 143
    result.interrupted = True
    assert result._judge(-2, None, KILLED) == 130
    assert capsys.readouterr().err == ""
