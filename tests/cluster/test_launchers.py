"""Every launcher starts a job as one MPI world, with the metrics of plain `deepspeed`. Slurm: see test_slurm.py.

Launchers of MPICH and Open MPI start it on two hosts where the machine can have them (support/hosts.py), otherwise on
this one; Intel MPI's start it on one host, because its wheel lacks libfabric, which it needs between hosts.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.test_survival import PYTHON as OPEN_MPI
from tests.support.hosts import Hosts, missing
from tests.support.jobs import TRAIN, Job, records, run, small_model
from tests.support.ranks import REPO

pytestmark = [pytest.mark.extended, pytest.mark.alone]
MPICH = Path(sys.executable)
INTEL_MPI = Path(os.environ.get("UBSMOE_DS_IMPI_PYTHON", REPO / ".venv-impi" / "bin" / "python"))
SHORT = ["train.rounds=1", "train.local_steps=2", "data.rows=200", "data.eval_rows=12", "deepspeed.train_batch_size=4"]
SHORT += [small_model()]
CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}]"
DEEPSPEED = "PYTHON -m deepspeed.launcher.runner"  # what the command `deepspeed` runs
ON_HOSTS = "--hostfile HOSTFILE --force_multi --no_ssh_check --master_addr ADDRESS --launcher"
OPEN_MPI_HERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


class Launcher(NamedTuple):
    """One way to start the job; words in capitals are filled in."""

    python: Path  # in the environment with its MPI, whose programs come first on PATH
    command: str
    environment: dict[str, str] = {}
    hosts: bool = True  # whether it can start the job on several hosts


LAUNCHERS = {
    "deepspeed --launcher mpich": Launcher(MPICH, f"{DEEPSPEED} {ON_HOSTS} mpich"),
    "deepspeed --launcher openmpi": Launcher(OPEN_MPI, f"{DEEPSPEED} {ON_HOSTS} openmpi", OPEN_MPI_HERE),
    "deepspeed --launcher impi": Launcher(INTEL_MPI, f"{DEEPSPEED} {ON_HOSTS} impi", {"I_MPI_FABRICS": "shm"}, False),
    "mpiexec of Open MPI": Launcher(
        OPEN_MPI, "mpiexec --host PLACES -n 2 -x PYTHONPATH PYTHON -u -m mpi4py", OPEN_MPI_HERE
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the metrics of the job as plain `deepspeed` starts it on one host."""
    out = tmp_path_factory.mktemp("whole")
    code, output = run("deepspeed", TRAIN, *SHORT, CLIENTS, f"output={out}")
    assert code == 0, output
    return [record["metrics"] for record in records(out / "tiny")]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_it_starts_one_world(name, whole, tmp_path):
    launcher = LAUNCHERS[name]
    if not launcher.python.exists():
        pytest.skip(f"{launcher.python} is missing: make {'impi' if launcher.python == INTEL_MPI else 'openmpi'}")
    several = launcher.hosts and missing() is None
    with Hosts(tmp_path / "hosts", 2) if several else nullcontext() as hosts:
        names = hosts.names if hosts else ["localhost"]
        slots = 2 // len(names)
        (tmp_path / "hostfile").write_text("".join(f"{host} slots={slots}\n" for host in names))
        words = {"PYTHON": str(launcher.python), "HOSTFILE": str(tmp_path / "hostfile")}
        words |= {"PLACES": ",".join(f"{host}:{slots}" for host in names)}
        words |= {"ADDRESS": "10.77.0.1" if hosts else "127.0.0.1"}
        command = [words.get(word, word) for word in launcher.command.split()]
        command += [TRAIN, *SHORT, CLIENTS, f"output={tmp_path}"]
        folders = [str(launcher.python.parent), str(MPICH.parent), os.environ["PATH"]]
        environment = launcher.environment | {"PATH": os.pathsep.join(folders)}
        if hosts:
            command, environment = hosts.command("n0", command), hosts.environment | environment
        job = Job(command, tmp_path / "log", **environment)
        assert job.end() == 0, job.output
    assert not several or "placement: n0: a 1; n1: b 1" in job.output, job.output
    assert [record["metrics"] for record in records(tmp_path / "tiny")] == whole


def test_deepspeed_with_mpich_refuses_an_uneven_hostfile(tmp_path):
    """DeepSpeed refuses it in its own words; our --hostfile takes such a file."""
    (tmp_path / "hostfile").write_text("n0 slots=2\nn1 slots=1\n")
    words = {"PYTHON": str(MPICH), "HOSTFILE": str(tmp_path / "hostfile"), "ADDRESS": "127.0.0.1"}
    command = [words.get(word, word) for word in f"{DEEPSPEED} {ON_HOSTS} mpich".split()]
    job = Job([*command, TRAIN], tmp_path / "log")
    assert job.end() == 1 and "MPICH requires same number of devices per node" in job.output, job.output
