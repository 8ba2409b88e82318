"""Re-execution, devices and precision: what is refused, and with which words."""

import sys
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.ranks import run_ranks
from ubsmoe_ds import relaunch, world
from ubsmoe_ds.errors import UserError


def test_inside_mpi_knows_each_process_manager():
    assert not relaunch.inside_mpi({"RANK": "0", "WORLD_SIZE": "4"})
    for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        assert relaunch.inside_mpi({name: "0"})


def test_the_script_runs_itself_under_mpiexec(monkeypatch):
    started = []

    def popen(command, env, **_):
        started.append((command, env))
        return SimpleNamespace(poll=lambda: 7, wait=lambda: 7)

    monkeypatch.setattr(relaunch.subprocess, "Popen", popen)
    monkeypatch.setattr(relaunch.signal, "signal", lambda *_: None)
    for name in relaunch.RENDEZVOUS_VARIABLES:
        monkeypatch.setenv(name, "0")
    assert relaunch.relaunch("launch/train.py", ["train.rounds=1"], 6) == 7
    ((command, environment),) = started
    assert command[0].endswith("mpiexec")
    assert command[1:] == ["-n", "6", sys.executable, "-u", "-m", "mpi4py", "launch/train.py", "train.rounds=1"]
    assert not set(relaunch.RENDEZVOUS_VARIABLES) & set(environment), "the launcher's world must not leak into ours"


@pytest.mark.parametrize(
    ("restarts", "codes", "left_by_first", "resumes"),
    [
        (0, [9], True, [False]),
        (2, [9, 0], True, [False, True]),  # what the first attempt has saved is gone on from
        (2, [9, 9, 9], False, [False, False, False]),  # the only checkpoint there is, is an earlier run's
        (2, [75], True, [False]),  # asked to stop, and the like: not started again
        (2, [2], True, [False]),
    ],
)
def test_what_died_starts_again(restarts, codes, left_by_first, resumes, monkeypatch):
    commands, checkpoints = [], {("000001-round-1", 17)}

    def popen(command, env, **_):
        code = codes[len(commands)]
        commands.append(command)
        if code != 9:  # not killed
            relaunch.sign_off(env, code)
        if left_by_first:
            checkpoints.add(("000001-round-1", 18))
        return SimpleNamespace(poll=lambda: code, wait=lambda: code)

    monkeypatch.setattr(relaunch.subprocess, "Popen", popen)
    monkeypatch.setattr(relaunch.signal, "signal", lambda *_: None)
    found = relaunch.relaunch("launch/train.py", [], 2, restarts=restarts, saved=lambda: set(checkpoints))
    assert found == codes[-1]
    assert [command[-2:] == ["--resume", "auto"] for command in commands] == resumes


def test_only_one_process_speaks():
    assert (
        relaunch.is_first({}) and relaunch.is_first({"LOCAL_RANK": "0"}) and not relaunch.is_first({"LOCAL_RANK": "1"})
    )
    assert relaunch.is_first({"PMI_RANK": "0", "LOCAL_RANK": "3"}) and not relaunch.is_first({"PMI_RANK": "2"})


def test_no_mpiexec_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(relaunch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="mpiexec: not found beside python or on PATH; install the wheel `mpich`"):
        relaunch.relaunch("launch/train.py", [], 6)


def fake_world(ranks_on_host: int, host_rank: int = 0):
    return SimpleNamespace(
        comm=SimpleNamespace(Split_type=lambda *_, **__: SimpleNamespace(size=ranks_on_host)),
        rank=0,
        host_rank=host_rank,
    )


@pytest.mark.parametrize(
    ("devices", "oversubscribe", "local"), [(0, False, "5"), (8, False, "5"), (4, True, "1"), (1, True, "0")]
)
def test_ranks_get_the_device_of_their_place_on_the_host(devices, oversubscribe, local, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    exp = tiny.experiment("unused", [{"budget": 1.0}], oversubscribe=oversubscribe)
    world.check_devices(exp, fake_world(6, host_rank=5), devices)
    assert world.os.environ["LOCAL_RANK"] == local


def test_too_few_devices_are_refused_with_the_arithmetic():
    exp = tiny.experiment("unused", [{"budget": 1.0}])
    with pytest.raises(UserError, match="6 ranks on this host, 4 accelerators: 2 too few;.*oversubscribe=true"):
        world.check_devices(exp, fake_world(6), 4)
    exp = tiny.experiment("unused", [{"budget": 1.0}, {"budget": 1.0, "ranks": 2}], oversubscribe=True)
    with pytest.raises(UserError, match="'c1' has 2 ranks for 1 accelerators.*cannot share a device"):
        world.check_devices(exp, fake_world(3), 1)


def test_bf16_is_refused_where_the_device_lacks_it(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    from ubsmoe_ds.client import Client

    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    exp = tiny.experiment("unused", [{"budget": 1.0}], deepspeed=tiny.deepspeed(bf16=True))
    with pytest.raises(UserError, match="deepspeed.bf16.enabled: true, but .* has no bfloat16; set it to false"):
        Client(exp, exp.clients[0], 0)


@pytest.mark.slow
def test_ranks_share_the_cores_that_they_may_run_on(tmp_path):
    """Rank 0 may run on cores 0 - 7, rank 1 on 0 - 3, rank 2 on core 9 alone, rank 3 on 0 - 3 and 10 - 11."""
    sets = [[*range(8)], [*range(4)], [9], [*range(4), 10, 11]]
    found = run_ranks(tmp_path, 4, "tests.scenarios:fair_cores", {"sets": sets})
    assert [int(rank["cores"]) for rank in found] == [5, 1, 1, 3]  # 4/3 + 4, 4/3, 1, 4/3 + 2
