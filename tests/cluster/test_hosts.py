"""Jobs on several hosts (network namespaces here) give the metrics of one host, and end when a host is cut off.

In /etc/hosts a host's own name resolves to 127.0.1.1, as Debian writes it, and each host has a bridge 172.17.0.1.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.test_survival import PYTHON as OPEN_MPI
from tests.support import watched_job
from tests.support.hosts import Hosts, missing
from tests.support.jobs import TRAIN, Job, records, small_model, train
from tests.support.sites import write
from ubsmoe_ds.data import synthetic

MPICH = Path(sys.executable)
pytestmark = pytest.mark.alone
SHORT = ["train.rounds=2", "train.local_steps=2", "data.rows=200", "data.eval_rows=12", "deepspeed.train_batch_size=4"]
SHORT += [small_model()]
CLIENTS = "clients=[{name: a, budget: 0.5, ranks: 2}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}]"
PRIVATE = Path("/dev/shm")  # each host has its own
TIMEOUT = 5  # host_timeout_s
WAY_OUT = 30  # seconds after it until nothing is left, on a busy machine


@pytest.fixture(scope="module", autouse=True)
def _machine():
    """Skip where the machine cannot have hosts; checked when a test runs, not at collection."""
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the metrics of the job on one host."""
    out = tmp_path_factory.mktemp("whole")
    code, output = train(*SHORT, CLIENTS, f"output={out}")
    assert code == 0, output
    return [record["metrics"] for record in records(out / "tiny")]


def hostfile(hosts: Hosts) -> str:
    """Write a hostfile with 4 slots in all; return its path."""
    path = hosts.folder / "hostfile"
    path.write_text("".join(f"{name} slots={4 // len(hosts.names)}\n" for name in hosts.names))
    return str(path)


LAYOUTS = {
    2: "placement: n0: a 2; n1: b 2",
    4: "placement: n0: a 1; n1: a 1; n2: b 1; n3: b 1; expert parallelism of b crosses hosts",
}


@pytest.mark.extended
@pytest.mark.parametrize("count", LAYOUTS, ids=["a client a host", "clients across hosts"])
def test_hosts_give_the_metrics_of_one(count, whole, tmp_path):
    with Hosts(tmp_path / "hosts", count, own_name="127.0.1.1") as hosts:
        before = [hosts.received(name) for name in hosts.names]
        command = [sys.executable, TRAIN, "--hostfile", hostfile(hosts), *SHORT, CLIENTS, f"output={tmp_path}"]
        mine = {"HF_TOKEN": "hf_secret", "UBSMOE_DS_MINE": "1"}
        job = Job(hosts.command("n0", command), tmp_path / "log", **hosts.environment, **mine)
        job.wait_for("round   1/")
        (_, last) = max(job.rank_pids().items())
        variables = Path(f"/proc/{last}/environ").read_bytes().split(b"\0")
        assert b"UBSMOE_DS_MINE=1" in variables and not any(name.startswith(b"HF_TOKEN") for name in variables)
        assert job.end() == 0, job.output
        received = [hosts.received(name) - old for name, old in zip(hosts.names, before, strict=True)]
    assert LAYOUTS[count] in job.output and "warning" not in job.output, job.output
    rounds = records(tmp_path / "tiny")
    assert [record["metrics"] for record in rounds] == whole  # to the bit, although sums travel in messages here
    # all bytes that merging sends by MPI; those that a rank sends to itself need no cable
    merged = 1e6 * sum(record["metrics"].get("exchange/megabytes", 0) for record in rounds)
    assert min(received) > merged / 4 > 0
    # a host receives more than that only if its group's own world (gloo) uses the cable too
    assert (min(received) > merged) == (count == 4), received


@pytest.mark.extended
def test_clients_at_uneven_sites_give_the_metrics_of_one_host(tmp_path):
    """The first client is pinned to the second host; each reads rows that only its own host has."""
    rows = synthetic.rows(120, seed=5)
    common = write(tmp_path / "eval.jsonl", rows[:20])
    sites = {"n1": tmp_path / "a.jsonl", "n0": tmp_path / "b.jsonl"}
    write(sites["n1"], rows[20:50])
    write(sites["n0"], rows[50:])

    def options(name: str, folder: Path, pin: str) -> list[str]:
        clients = f"clients=[{{name: a, budget: 0.5, source: jsonl:{folder / 'a.jsonl'}{pin}}}, "
        clients += f"{{name: b, budget: 1.0, ranks: 2, source: jsonl:{folder / 'b.jsonl'}}}]"
        rounds = ["train.rounds=1", "train.local_steps=2", "data.eval_rows=12"]
        return [f"name={name}", f"output={tmp_path}", f"data.eval_source={common}", *rounds, clients]

    with Hosts(tmp_path / "hosts", 2) as hosts:
        for host, path in sites.items():
            subprocess.run(hosts.command(host, ["cp", str(path), PRIVATE]), check=True)
        assert not any((PRIVATE / path.name).exists() for path in sites.values())
        listed = tmp_path / "hostfile"
        listed.write_text("n0 slots=3\nn1 slots=1\n")
        command = [sys.executable, TRAIN, "--hostfile", str(listed), *options("sites", PRIVATE, ", hosts: [n1]")]
        job = Job(hosts.command("n0", command), tmp_path / "log", **hosts.environment)
        assert job.end() == 0, job.output
    assert "placement: n1: a 1; n0: b 2" in job.output and "warning" not in job.output, job.output
    code, output = train(*options("whole", tmp_path, ""))
    assert code == 0, output
    actual, expected = ([record["metrics"] for record in records(tmp_path / name)] for name in ("sites", "whole"))
    assert actual == expected and len(actual) > 1


def by_mpiexec(hosts: Hosts) -> list[str]:
    """Return the user's own command with MPICH's mpiexec."""
    each = 4 // len(hosts.names)
    where = ",".join(f"{name}:{each}" for name in hosts.names)
    return ["mpiexec", "-hosts", where, "-n", "4", sys.executable, "-u", "-m", "mpi4py", TRAIN]


def by_open_mpi(hosts: Hosts) -> list[str]:
    """Return the plain command under Open MPI."""
    return [str(OPEN_MPI), TRAIN, "--hostfile", hostfile(hosts)]


@pytest.mark.parametrize("start", [by_mpiexec, pytest.param(by_open_mpi, marks=pytest.mark.extended)])
def test_a_host_that_is_cut_off_ends_the_job_which_then_goes_on(start, whole, tmp_path):
    if start is by_open_mpi and not OPEN_MPI.exists():
        pytest.skip("no Open MPI: see tests/cluster/test_survival.py")
    options = [*SHORT, CLIENTS, f"output={tmp_path}", f"host_timeout_s={TIMEOUT}"]
    path = f"{OPEN_MPI.parent}{os.pathsep}{os.environ['PATH']}" if start is by_open_mpi else None
    with Hosts(tmp_path / "hosts", 2) as hosts:
        environment = hosts.environment | ({"PATH": path} if path else {})
        job = Job(hosts.command("n0", [*start(hosts), *options]), tmp_path / "log", **environment)
        job.wait_for("round   1/2")
        while not list((tmp_path / "tiny" / "checkpoints").glob("*-round-1")):
            assert job.process.poll() is None, job.output
            time.sleep(0.02)
        hosts.cut("n1")
        try:
            assert job.end(TIMEOUT + WAY_OUT) == 1, job.output
        finally:
            job.kill()
        (line,) = [line for line in job.output.splitlines() if line.startswith("error:")]
        assert line.startswith("error: host n1 (client 'b', job ranks 2 3) has not been heard from for 5 s; ")
        assert [record["round"] for record in records(tmp_path / "tiny")] == [0, 1]
        if start is by_open_mpi:
            return  # going on is the same
        hosts.mend("n1")
        command = [sys.executable, TRAIN, "--hostfile", hostfile(hosts), *options, "--resume", "auto"]
        job = Job(hosts.command("n0", command), tmp_path / "log", **hosts.environment)
        assert job.end() == 0 and "resumed from" in job.output, job.output
    assert [record["metrics"] for record in records(tmp_path / "tiny")] == whole


@pytest.mark.extended
@pytest.mark.parametrize(("python", "cut"), [(MPICH, "n0"), (MPICH, "n2"), (OPEN_MPI, "n0"), (OPEN_MPI, "n2")])
def test_all_of_three_hosts_end(python, cut, tmp_path):
    """Cut off the host of mpiexec, or another; whatever the launcher does, the user reads which host is lost."""
    if not python.exists():
        pytest.skip("no Open MPI: see tests/cluster/test_survival.py")
    where = ["--bind-to", "none", "--allow-run-as-root", "-x", "PYTHONPATH"] if python == OPEN_MPI else []
    where += ["--host" if python == OPEN_MPI else "-hosts", "n0:2,n1:1,n2:2"]
    command = [
        str(python.with_name("mpiexec")),
        *where,
        "-n",
        "5",
        str(python),
        "-m",
        "mpi4py",
        "tests/support/watched_job.py",
        "5",
    ]
    with Hosts(tmp_path / "hosts", 3) as hosts:
        job = Job(hosts.command("n0", command), tmp_path / "log", **hosts.environment)
        for rank in range(5):
            job.wait_for(f"waiting {rank}")
        hosts.cut(cut)
        try:
            assert job.end(watched_job.HOST_TIMEOUT_S + WAY_OUT) != 0, job.output
        finally:
            job.kill()
        lines = {line for line in job.output.splitlines() if line.startswith("error: ")}
        named = "n1" if cut == "n0" else cut  # as seen from the host where the user is
        assert len(lines) == 1 and lines.pop().startswith(f"error: host {named} (client"), job.output
