"""Temporary folders go with their makers, and those of makers that were killed with the next one."""

import multiprocessing
import os
import tempfile
import time

import pytest

from ubsmoe_ds.launching import scratch
from ubsmoe_ds.launching.run_folder import open_run_folder
from ubsmoe_ds.launching.scratch import LOCK, OLD_SECONDS, PREFIX, scratch_folder, sweep


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make(made, done):
    with scratch_folder() as folder:
        (folder / "socket").write_text("")
        made.set()
        done.wait()


def test_what_a_killed_process_has_left_goes_at_the_next_start(temporary):
    """A living process keeps its folder, and so does a stranger."""
    (temporary / f"{PREFIX}mine").mkdir()
    context = multiprocessing.get_context("fork")
    made, done = context.Event(), context.Event()
    process = context.Process(target=make, args=(made, done))
    process.start()
    assert made.wait(10)
    sweep()
    (left,) = (path.parent for path in temporary.glob("*/socket"))
    process.kill()
    process.join()
    assert left.exists()
    with scratch_folder() as folder:
        assert sorted(temporary.iterdir()) == sorted([folder, temporary / f"{PREFIX}mine"])
        assert folder.stat().st_mode & 0o777 == 0o700
        sweep()
        assert (folder / LOCK).exists()
    assert [*temporary.iterdir()] == [temporary / f"{PREFIX}mine"]


def test_names_of_memory_go_once_their_makers_are_gone_and_they_are_old(temporary, monkeypatch):
    """Of process 2^22 + 1, which cannot be, and of this one; names that are no MPICH's stay."""
    monkeypatch.setattr(scratch, "SHARED_MEMORY", temporary)
    names = {
        "mpich_shm_400001_0": False,
        f"mpich_shm_{os.getpid():x}_0": True,
        "mpich_shm_x_0": True,
        "other_1_2": True,
    }
    for name in [*names, "mpich_shm_400001_1"]:
        (temporary / name).write_bytes(b"")
        if name != "mpich_shm_400001_1":
            os.utime(temporary / name, (time.time() - 2 * OLD_SECONDS,) * 2)
    scratch.sweep_memory()
    assert {path.name for path in temporary.iterdir()} == {name for name, stays in names.items() if stays} | {
        "mpich_shm_400001_1"
    }


def test_a_lock_that_is_a_link_is_not_followed(temporary):
    """Anybody may write to /tmp."""
    (temporary / "precious").write_text("")
    (temporary / f"{PREFIX}trap").mkdir()
    (temporary / f"{PREFIX}trap" / LOCK).symlink_to(temporary / "precious")
    sweep()
    assert (temporary / f"{PREFIX}trap").exists() and (temporary / "precious").exists()


def test_half_written_files_of_a_killed_job_go_with_the_next(temporary):
    run = temporary / "run"
    for folder in (run / ".unfinished-a", run / "adapter" / "clients" / "phone" / ".unfinished-b", run / "adapter"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_text("")
    open_run_folder(run, "id").close()
    assert sorted(path.name for path in run.rglob("*")) == [".owner", "adapter", "clients", "file", "phone"]
