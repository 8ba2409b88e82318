"""A run's folder has one owner at a time, however that one ends."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket

import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching import ownership
from ubsmoe_ds.launching.ownership import FILE, claim, holder_of
from ubsmoe_ds.launching.run_folder import open_run_folder


def hold(folder, held, done):
    with claim(folder, "first"):
        held.set()
        done.wait()


@pytest.fixture
def other_job(tmp_path):
    """Another process that holds the folder until it is killed."""
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, done))
    process.start()
    held.wait(10)
    yield process
    process.kill()
    process.join()


def test_a_folder_that_is_held_is_refused_with_its_owner(tmp_path, other_job):
    line = rf"output: {tmp_path} is in use by run first \(process {other_job.pid} on {socket.gethostname()}, since 2"
    assert holder_of(tmp_path).startswith("run first (process")
    with pytest.raises(UserError, match=line):
        claim(tmp_path, "second", wait_s=0)
    with pytest.raises(UserError, match=line):
        open_run_folder(tmp_path, "second", wait_s=0.15)
    assert json.loads((tmp_path / FILE).read_text())["run_id"] == "first"
    os.kill(other_job.pid, signal.SIGKILL)
    with claim(tmp_path, "second"):
        assert json.loads((tmp_path / FILE).read_text())["run_id"] == "second"


def test_a_folder_is_free_again_when_the_file_is_closed(tmp_path):
    assert holder_of(tmp_path) == "" == holder_of(tmp_path / "none")
    first = claim(tmp_path, "first")
    with pytest.raises(UserError, match="in use by run first"):
        claim(tmp_path, "second", wait_s=0)
    first.close()
    assert holder_of(tmp_path) == ""
    claim(tmp_path, "second", wait_s=0).close()


def test_a_look_does_not_keep_an_owner_out(tmp_path, monkeypatch):
    """The lock of a process that only looks is waited for."""
    claim(tmp_path, "before").close()
    with (tmp_path / FILE).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(ownership.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with claim(tmp_path, "first"):
            assert holder_of(tmp_path).startswith("run first ")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_an_owner_that_left_no_name_is_another_job(tmp_path, text):
    with claim(tmp_path, "first"):
        (tmp_path / FILE).write_text(text)
        assert holder_of(tmp_path) == "another job"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert holder_of(tmp_path) == ""
    claim(tmp_path, "first").close()
    assert holder_of(tmp_path) == ""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be locked (No locks available); see to it that no other job" in error


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: .* cannot be written"):
        open_run_folder(tmp_path / "file" / "run", "id")
