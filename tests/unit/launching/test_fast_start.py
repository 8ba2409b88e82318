"""Where ranks are forked and where each imports for itself. What the fork server does: tests/distributed."""

import tempfile
from types import SimpleNamespace

import pytest

from ubsmoe_ds.launching import fast_start, fork_server


@pytest.fixture
def started(monkeypatch):
    """Commands of processes that would have been started."""
    commands = []

    def popen(command, **_):
        commands.append(command)
        return SimpleNamespace(pid=1, kill=lambda: None, wait=lambda: None)

    monkeypatch.setattr(fast_start.subprocess, "Popen", popen)
    monkeypatch.setattr(fast_start, "is_cpu_build", lambda: True)
    return commands


def test_a_server_is_started_with_what_ranks_import(started):
    with fast_start.shims({}, sound=True) as words:
        assert words[:-1] == fast_start.through("")[:-1] and words[-1].endswith("/fork_server")
    assert started[0][-len(fast_start.PRELOADED) :] == list(fast_start.PRELOADED)


def test_a_server_that_is_there_is_used(started):
    with fast_start.shims({fast_start.SERVER: "/a/server"}, sound=True) as words:
        assert words == fast_start.through("/a/server")
    assert not started


@pytest.mark.parametrize("environment", [{}, {fast_start.SERVER: "/a/server"}])
def test_elsewhere_ranks_import_for_themselves(environment, started):
    with fast_start.shims(environment, sound=False) as words:
        assert not words
    assert not started


def test_with_an_accelerator_they_import_for_themselves(started, monkeypatch):
    monkeypatch.setattr(fast_start, "is_cpu_build", lambda: False)
    with fast_start.shims({}, sound=True) as words:
        assert not words
    assert not started


def test_a_path_too_long_for_a_socket_costs_time_only(started, monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(deep))
    with fast_start.shims({}, sound=True) as words:
        assert not words
    assert not started


@pytest.mark.parametrize(
    ("version", "cpu"),
    [
        ("cuda = None\nhip = None\nxpu = None", True),
        ("cuda: str = '13.0'\nhip = None", False),
        ("cuda = None\nhip = '7.1'", False),
        ("cuda = None\nxpu = '2025'", False),
    ],
)
def test_which_torch_knows_no_accelerator(version, cpu, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text(version)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(fast_start, "find_spec", lambda name: spec)
    assert fast_start.is_cpu_build() == cpu


def test_which_variables_must_be_the_same():
    of_a_rank = {
        "PMI_RANK": "1",
        "MPI_LOCALRANKID": "1",
        "PWD": "/",
        "UBSMOE_DS_PARENT_SPEAKS": "/tmp/x",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    read = {"OMP_NUM_THREADS": "2", "HF_HOME": "/data"}
    assert fork_server.read_at_import(of_a_rank | read) == read
    assert fork_server.read_at_import({"PYTHONPATH": "/a:/b:/a"}) == {"PYTHONPATH": "/a:/b"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("-u -m mpi4py train.py -v", "-m mpi4py train.py -v"),
        ("train.py -m", "train.py -m"),
        ("-O train.py", ""),
        ("-u -c pass", ""),
        ("-m", ""),
        ("", ""),
    ],
)
def test_which_commands_a_fork_can_run(command, words):
    assert fork_server.words_after_options(command.split()) == words.split()
