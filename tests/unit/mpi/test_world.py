"""The script starts itself under mpiexec; ranks find their hosts, devices and cores; wrong set-ups are refused."""

import os
import sys
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching import fast_start, launchers, relaunch, sign_in, supervisor
from ubsmoe_ds.mpi import collectives, join
from ubsmoe_ds.mpi.rendezvous import Meeting


def test_both_backends_use_the_interface_that_leads_to_the_meeting(monkeypatch):
    """gloo's variable names it, NCCL's names what begins so unless there is an = before; the user's own stay."""
    comm = SimpleNamespace(rank=1, size=4)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "before")
    for asked, gloo, nccl in (("", "eth1", "=eth1"), ("ib0", "ib0", "ib0")):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(name, asked)
            if not asked:
                monkeypatch.delenv(name)
        join._set_rendezvous(Meeting("10.0.0.1", 5000, "eth1"), comm, comm)
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (gloo, nccl)
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("1", "10.0.0.1")


@pytest.fixture
def start_with(monkeypatch):
    """Have `relaunch` start this function in place of mpiexec, and no process that forks ranks."""

    def replace(popen, open_mpi=False):
        monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
        monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
        monkeypatch.setattr(relaunch, "is_open_mpi", lambda _: open_mpi)
        monkeypatch.setattr(relaunch, "is_mpich", lambda _: not open_mpi)
        monkeypatch.setattr(fast_start, "is_cpu_build", lambda: False)
        monkeypatch.delenv(fast_start.SERVER, raising=False)

    return replace


# 0 counts although no rank has signed in: all are on other hosts; 7 may be the number of a signal
@pytest.mark.parametrize(("of_mpiexec", "code"), [(7, 1), (0, 0)])
def test_the_script_runs_itself_under_mpiexec(of_mpiexec, code, start_with, monkeypatch):
    started = []

    def popen(command, env, **_):
        started.append((command, env))
        return SimpleNamespace(poll=lambda: of_mpiexec, wait=lambda: of_mpiexec)

    start_with(popen)
    for name in launchers.RENDEZVOUS_VARIABLES:
        monkeypatch.setenv(name, "0")
    assert relaunch.relaunch("launch/train.py", ["train.rounds=1"], 6) == code
    ((command, environment),) = started
    assert command[0].endswith("mpiexec")
    assert command[1:] == ["-n", "6", sys.executable, "-u", "-m", "mpi4py", "launch/train.py", "train.rounds=1"]
    assert not set(launchers.RENDEZVOUS_VARIABLES) & set(environment), "the launcher's world must not leak into ours"


def test_only_processes_of_this_host_are_supervised(tmp_path):
    """Hosts may share the temporary folder; the process id of another host's rank may be any process of this one."""
    environment = {sign_in.PARENT_SPEAKS: str(tmp_path)}
    sign_in.sign_in(environment, "a rank here")  # no process supervises from there
    (tmp_path / sign_in.SUPERVISED_FROM).write_text("another boot 4026531836")
    sign_in.sign_in(environment, "a rank of another host")
    assert [path.name for path in tmp_path.iterdir()] == [sign_in.SUPERVISED_FROM]
    (tmp_path / sign_in.SUPERVISED_FROM).write_text(sign_in.process_table())
    sign_in.sign_in(environment, "a rank here")
    assert (tmp_path / str(os.getpid())).read_text() == "a rank here"


@pytest.mark.parametrize(("writes", "code"), [(True, 0), (False, 1)])
def test_open_mpi_is_not_believed_where_no_rank_was_here(writes, code, start_with):
    """Open MPI's mpiexec ends with 0 when it has lost all hosts with ranks."""
    summaries: set[tuple] = set()

    def popen(command, env, **_):
        summaries.update({("summary.json", 7)} if writes else set())
        return SimpleNamespace(poll=lambda: 0, wait=lambda: 0)

    start_with(popen, open_mpi=True)
    assert relaunch.relaunch("launch/train.py", [], 2, hosts={"n0": 2}, finished=lambda: set(summaries)) == code


@pytest.mark.parametrize(
    ("restarts", "codes", "left_by_first", "resumes"),
    [
        (0, [9], True, [False]),
        (2, [9, 0], True, [False, True]),  # the second attempt goes on from what the first has saved
        (2, [9, 9, 9], False, [False, False, False]),  # the only checkpoint is an earlier run's
        (2, [75], True, [False]),  # asked to stop, and the like: not started again
        (2, [2], True, [False]),
    ],
)
def test_a_job_that_died_starts_again(restarts, codes, left_by_first, resumes, start_with):
    commands, checkpoints = [], {("000001-round-1", 17)}

    def popen(command, env, **_):
        code = codes[len(commands)]
        commands.append(command)
        if code != 9:  # not killed
            sign_in.sign_off(env, code)
        if left_by_first:
            checkpoints.add(("000001-round-1", 18))
        return SimpleNamespace(poll=lambda: code, wait=lambda: code)

    start_with(popen)
    code = relaunch.relaunch("launch/train.py", [], 2, restarts=restarts, saved=lambda: set(checkpoints))
    assert code == (1 if codes[-1] == 9 else codes[-1])
    assert [command[-2:] == ["--resume", "auto"] for command in commands] == resumes


def test_a_missing_mpiexec_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(relaunch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="mpiexec: not found beside python or on PATH; install the wheel `mpich`"):
        relaunch.relaunch("launch/train.py", [], 6)


def fake_world(clients: list[int], rank: int = 0):
    """A world whose host has these clients' ranks, all with the same devices; `rank` is this rank's place there."""

    def gather(_, received):
        received[:] = clients

    same = SimpleNamespace(size=len(clients), rank=rank, Allgather=gather)
    return SimpleNamespace(host_comm=SimpleNamespace(Split=lambda **_: same), rank=0, group=0)


@pytest.mark.parametrize(
    ("sharers", "rank", "devices", "oversubscribe", "local"),
    [
        (6, 5, 0, False, "9"),
        (6, 5, 8, False, "5"),
        (6, 5, 4, True, "1"),
        (6, 5, 1, True, "0"),
        (1, 0, 1, False, "0"),  # a launcher that shows each rank a device of its own
    ],
)
def test_ranks_get_the_device_of_their_place_on_the_host(sharers, rank, devices, oversubscribe, local, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "9")
    exp = tiny.experiment("unused", [{"budget": 1.0}], oversubscribe=oversubscribe)
    join.check_devices(exp, fake_world([*range(sharers)], rank), [f"GPU-{n}" for n in range(devices)])
    assert os.environ["LOCAL_RANK"] == local


def test_too_few_devices_are_refused_with_the_arithmetic():
    exp = tiny.experiment("unused", [{"budget": 1.0}])
    with pytest.raises(UserError, match="6 ranks on this host, 4 accelerators: 2 too few;.*oversubscribe=true"):
        join.check_devices(exp, fake_world([*range(6)]), ["a", "b", "c", "d"])
    exp = tiny.experiment("unused", [{"budget": 1.0}, {"budget": 1.0, "ranks": 2}], oversubscribe=True)
    with pytest.raises(UserError, match="'c1' has 2 ranks for 1 accelerators.*cannot share a device"):
        join.check_devices(exp, fake_world([0, 1, 1]), ["a"])


def test_a_client_on_several_hosts_needs_devices_for_its_ranks_here_alone(monkeypatch):
    """Two of the client's four ranks are on this host, beside another client's."""
    monkeypatch.setenv("LOCAL_RANK", "9")
    exp = tiny.experiment("unused", [{"budget": 1.0, "ranks": 4}, {"budget": 1.0}], oversubscribe=True)
    join.check_devices(exp, fake_world([0, 0, 1], rank=1), ["a", "b"])
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(("survives", "expected"), [("1", collectives.RanksLost), ("", MPI.Exception)])
def test_an_error_that_may_hide_a_death_counts_as_one_where_jobs_survive_them(survives, expected, monkeypatch):
    def fail():
        raise MPI.Exception(MPI.ERR_OTHER)

    monkeypatch.setenv(collectives.SURVIVES, survives)
    with pytest.raises(expected):
        collectives.wait_quietly(SimpleNamespace(Test=fail))


def test_bf16_is_refused_where_the_device_lacks_it(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    from ubsmoe_ds.client.engine import Client

    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    exp = tiny.experiment("unused", [{"budget": 1.0}], deepspeed=tiny.deepspeed(bf16=True))
    with pytest.raises(UserError, match="deepspeed.bf16.enabled: true, but .* has no bfloat16; set it to false"):
        Client(exp, exp.clients[0], 0)
