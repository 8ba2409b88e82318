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
