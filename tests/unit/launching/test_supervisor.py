"""The process that runs mpiexec goes on, whatever becomes of the ranks."""

import os
import subprocess

from ubsmoe_ds.launching import supervisor


def test_a_rank_that_cannot_be_killed_is_given_up(tmp_path, monkeypatch, capsys):
    """Such as one in a system call of a stuck file system: `--restarts` must go on without its end."""
    for name in ("LEAVE_SECONDS", "KILLED_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(supervisor, name, 0.05)
    monkeypatch.setattr(supervisor.Supervisor, "_send", lambda self, number: None)
    supervising = supervisor.Supervisor.__new__(supervisor.Supervisor)  # its signals are not for the tests
    with subprocess.Popen(["sleep", "60"]) as held:
        supervising.ranks = {os.pidfd_open(held.pid): "client 'a', rank 0 of 1"}
        supervising._end_what_is_left(tmp_path)
        held.kill()
    assert capsys.readouterr().err.startswith("warning: client 'a', rank 0 of 1 was killed, but has not ended: ")
    assert not supervising.ranks
