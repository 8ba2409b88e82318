"""Jobs under a real Slurm of two nodes on this host: the batch scripts, srun with each MPI, and DeepSpeed's launcher.

Both nodes are this host, so ranks meet through its loopback; test_hosts.py has hosts with addresses of their own.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_survival import PYTHON as OPEN_MPI_PYTHON
from tests.support.jobs import SHORT, TRAIN, Job, records, run, small_model, train
from tests.support.ranks import REPO
from tests.support.slurm_cluster import cluster, why_not
from ubsmoe_ds.launching.relaunch import OPEN_MPI_WAITS_QUIETLY

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}")]
TWO_CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}]"
TWO_RANKS = [TWO_CLIENTS, "train.rounds=2", "train.local_steps=12", "data.rows=200", "data.eval_rows=12"]
TWO_RANKS += [small_model()]
ON_TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
TRAIN_UNDER_MPI = ["-u", "-m", "mpi4py", TRAIN]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Start a Slurm cluster; return the environment of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # names of pytest's own folders are too long for sockets
    try:
        with cluster(folder) as environment:
            yield environment | {"PYTHON": sys.executable, "SLURM_WAIT": "15"}
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the metrics of two ranks without Slurm."""
    out = tmp_path_factory.mktemp("whole")
    code, output = train(*TWO_RANKS, f"output={out}")
    assert code == 0, output
    return metrics(out)


def metrics(out: Path) -> list[dict]:
    return [record["metrics"] for record in records(out / "tiny")]


def command(slurm: dict[str, str], *arguments: str) -> str:
    """Run one of Slurm's commands; return its output."""
    return subprocess.run(arguments, env=os.environ | slurm, check=True, capture_output=True, text=True).stdout


def script(path: Path, content: str) -> str:
    path.write_text(content)
    path.chmod(0o755)
    return str(path)


class BatchJob(Job):
    """A job submitted by `sbatch --wait`; `output` is its log."""

    def __init__(self, slurm: dict[str, str], folder: Path, *arguments: str, **environment: str) -> None:
        self.sbatch = ["sbatch", "--wait", "--parsable", f"--output={folder}/log", *arguments]
        super().__init__(self.sbatch, folder / "sbatch", **slurm, **environment)
        self.sent, self.log = self.log, folder / "log"
        deadline = time.monotonic() + 60
        while not self.log.exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.sent.read_text()
            time.sleep(0.1)
        self.id, self.slurm = self.sent.read_text().split()[0], slurm

    def end(self, seconds: float = 240) -> int:
        """Return its exit code; ask Slurm, because `sbatch --wait` looks only after 2, 8 and then 32 s."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts())["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.3)
        self.process.terminate()
        super().end(seconds)
        code, _, number = facts["ExitCode"].partition(":")
        return int(code) or int(number)

    def facts(self) -> dict[str, str]:
        """Return the fields that Slurm shows of the job."""
        shown = command(self.slurm, "scontrol", "show", "job", self.id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def test_the_demo_on_two_nodes_is_bit_equal_to_a_local_run(slurm, demo, tmp_path):
    """The demo is shortened; six ranks are the script's default."""
    job = BatchJob(slurm, tmp_path, "slurm/train.sbatch", *SHORT, f"output={tmp_path}")
    assert job.end() == 0, job.output
    assert f"job {job.id}, start 1, 6 tasks on n[0-1]" in job.output
    assert metrics(tmp_path) == [record["metrics"] for record in records(demo[0])]


# train.py takes two seconds a step until its third start, so that things can happen in the middle
SLOW_PYTHON = """#!/bin/bash
if ((${{SLURM_RESTART_COUNT:-0}} < 2)); then set -- "${{@:1:3}}" tests/support/failing_train.py "${{@:5}}"; fi
exec {python} "$@"
"""


@pytest.mark.extended
def test_preempted_and_out_of_time_it_goes_on_with_the_same_bits(slurm, whole, tmp_path):
    """Start 1 ends for a job of higher priority, start 2 by USR1 ahead of a real time limit, start 3 does the rest.

    Slurm looks at time limits every 30 s, and sends the signal if 90 + 30 s or less are left.
    """
    python = script(tmp_path / "python", SLOW_PYTHON.format(python=sys.executable))
    arguments = ["--time=10", "--signal=USR1@90", *ON_TWO_NODES, "slurm/train.sbatch", *TWO_RANKS]
    changes = [f"output={tmp_path}", "overwrite=false"]
    job = BatchJob(slurm | {"PYTHON": python}, tmp_path, *arguments, *changes, UBSMOE_DS_FAULT="slow@0")
    job.wait_for("before ")
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=echo first"]
    command(slurm, "sbatch", *urgent)
    job.wait_for(f"job {job.id}, start 2", 60)
    assert (tmp_path / "urgent").read_text() == "first\n"
    started = time.monotonic()
    job.wait_for("resumed from /")  # from here on USR1 is handled
    minutes = int(time.monotonic() - started) // 60 + 2
    command(slurm, "scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    job.wait_for("saved and queued again", 60)
    command(slurm, "scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    assert job.end() == 0, job.output
    assert job.output.count("stopped in round ") == 2 == job.output.count("resumed from /"), job.output
    assert f"job {job.id}, start 3" in job.output and f"job {job.id}, start 4" not in job.output
    assert metrics(tmp_path) == whole


@pytest.mark.extended
def test_scancel_saves_and_leaves_no_process_and_nothing_queued(slurm, tmp_path):
    changes = ["train.rounds=500", f"output={tmp_path}"]
    job = BatchJob(slurm, tmp_path, *ON_TWO_NODES, "slurm/train.sbatch", *TWO_RANKS, *changes)
    job.wait_for("round   1/")
    assert sorted(job.rank_pids()) == [0, 1]
    command(slurm, "scancel", job.id)
    assert job.end(60) != 0  # and no process is left behind
    assert "stopped in round " in job.output and "queued again" not in job.output
    assert command(slurm, "squeue", "--noheader") == ""
    assert job.facts()["JobState"] == "CANCELLED"


@pytest.mark.extended
def test_a_killed_rank_ends_the_job(slurm, tmp_path):
    """Without SLURM_WAIT srun would let the others wait for it until the time limit."""
    changes = ["train.rounds=500", f"output={tmp_path}"]
    environment = slurm | {"SLURM_WAIT": "2"}
    job = BatchJob(environment, tmp_path, *ON_TWO_NODES, "slurm/train.sbatch", *TWO_RANKS, *changes)
    job.wait_for("before ")
    os.kill(job.rank_pids()[1], 9)
    assert job.end(60) == 128 + 9, job.output
    assert "queued again" not in job.output


# stands in for MPI ranks, whose hosts cannot be cut off here: prints their message and ends with their exit code
LOST_PYTHON = """#!/bin/bash
echo "error: host n1 (client 'b', job ranks 2 3) has not been heard from for 60 s; the network or the host is down" >&2
exit 1
"""


@pytest.mark.extended
def test_a_job_that_has_lost_a_host_is_queued_again_but_not_for_ever(slurm, tmp_path):
    environment = slurm | {"PYTHON": script(tmp_path / "python", LOST_PYTHON), "LOST_HOSTS": "1", "SLURM_WAIT": "2"}
    job = BatchJob(environment, tmp_path, *ON_TWO_NODES, "slurm/train.sbatch")
    job.wait_for(f"job {job.id}, start 2", 60)
    assert job.end(60) == 1, job.output
    assert job.output.count("has lost a host and is queued again") == 1 and "start 3" not in job.output


# a comparison is asked to stop ahead of its time limit: (its exit code, starts before, whether it is queued again)
ASKED = {"stopped": (130, 0, True), "done": (0, 0, False), "a mistake": (2, 0, False), "too often": (130, 19, False)}


@pytest.mark.parametrize("name", ASKED)
def test_which_comparison_is_queued_again(name, tmp_path):
    """compare.sbatch alone, with stand-ins for compare.py and scontrol."""
    code, before, again = ASKED[name]
    script(tmp_path / "scontrol", '#!/bin/bash\necho "scontrol $@"\n')
    python = f"#!/bin/bash\ntrap 'exit {code}' TERM\nsleep 0.2\necho ready\nwhile true; do sleep 0.05; done\n"
    facts = {"SUBMIT_DIR": str(REPO), "CPUS_PER_TASK": "1", "JOB_ID": "7", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n0"}
    environment = {f"SLURM_{key}": value for key, value in (facts | {"RESTART_COUNT": str(before)}).items()}
    environment |= {"PYTHON": script(tmp_path / "python", python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = Job(["bash", "slurm/compare.sbatch"], tmp_path / "log", **environment)
    job.wait_for("ready")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end(20) == code
    assert ("scontrol requeue 7" in job.output) is again, job.output


@pytest.mark.extended
def test_comparison_as_an_array(slurm, tmp_path):
    """Task 2 is asked to stop as if it ran out of time, and goes on; then the plain command collects the results."""
    small = [TWO_CLIENTS, "train.rounds=2", "train.local_steps=2", "data.rows=200", "data.eval_rows=16"]
    options = [*small, "--methods", "topk", "flame", "--seeds", "0", "--out", str(tmp_path / "out")]
    code, listed = run(sys.executable, "launch/compare.py", *options, "--list")
    assert code == 0 and listed.split() == ["topk-seed0", "flame-seed0"]
    log = tmp_path / "log-%a"
    array = ["--wait", "--array=1-2", "--nodes=1", "--ntasks=2", f"--output={log}"]
    job = Job(["sbatch", *array, "slurm/compare.sbatch", *options], tmp_path / "sbatch", **slurm)
    flame = tmp_path / "out" / "runs" / "flame-seed0.log"
    deadline = time.monotonic() + 120
    while not (flame.exists() and "before " in flame.read_text()):
        assert time.monotonic() < deadline and job.process.poll() is None, job.output
        time.sleep(0.1)
    number = job.output.split()[-1]
    command(slurm, "scancel", "--batch", "--signal=USR1", f"{number}_2")
    assert job.end() == 0, job.output
    assert "queued again" in (tmp_path / "log-2").read_text() and "start 2" in (tmp_path / "log-2").read_text()
    assert "queued again" not in (tmp_path / "log-1").read_text()
    assert not (tmp_path / "out" / "results.csv").exists()
    code, output = run(sys.executable, "launch/compare.py", *options)
    assert code == 0 and output.count("done before") == 2, output
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["method"] for row in rows] == ["topk", "topk", "flame", "flame"]


def srun(mpi: str, tasks: int, *arguments: str, python: str = sys.executable) -> list[str]:
    return ["srun", f"--mpi={mpi}", "--nodes=2", f"--ntasks={tasks}", python, *TRAIN_UNDER_MPI, *arguments]


@pytest.mark.extended
def test_srun_with_pmix(slurm, whole, tmp_path):
    """Open MPI takes at most two ranks per node here."""
    if not OPEN_MPI_PYTHON.exists():
        pytest.skip("no Open MPI: make openmpi")
    code, output = run("srun", "--mpi=pmix", "true", **slurm)
    if code:
        pytest.skip(f"this Slurm has no PMIx ({output.splitlines()[0][:200]}): apt-get install libpmix-dev")
    quietly = slurm | OPEN_MPI_WAITS_QUIETLY
    code, output = run(*srun("pmix", 2, *TWO_RANKS, f"output={tmp_path}", python=str(OPEN_MPI_PYTHON)), **quietly)
    assert code == 0, output
    for actual, expected in zip(metrics(tmp_path), whole, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.extended
def test_deepspeed_slurm_launcher(slurm, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n0 slots=1\nn1 slots=1\n")
    launcher = ["--hostfile", str(hostfile), "--launcher", "slurm", "--launcher_args", "--mpi=pmi2 --nodes=2"]
    small = [TWO_CLIENTS, "train.rounds=1", "train.local_steps=1", "data.rows=200", "data.eval_rows=12"]
    launcher += ["--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    code, output = run("deepspeed", *launcher, TRAIN, *small, f"output={tmp_path / 'out'}", **slurm)
    assert code == 0 and "2 clients on 2 ranks" in output, output
    assert len(metrics(tmp_path / "out")) == 2


# Fill the memory behind addresses with text, which MPICH sends along and cannot shorten as it does runs of zeros. Every
# second block is free, for MPI's next allocations.
DENSE_MEMORY = """
import ctypes, os
from ubsmoe_ds.mpi.start import start_mpi
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(6000) for _ in range(400)]
for block in blocks:
    ctypes.memmove(block, b"text without any runs " * 250, 5500)
for size in (64, 100, 150, 200, 250, 300, 400, 500):
    small = [libc.malloc(size) for _ in range(30)]  # use up free blocks of these sizes
for block in blocks[::2]:
    libc.free(block)
start_mpi(os.environ)
from mpi4py import MPI
print(MPI.COMM_WORLD.allreduce(1), "ranks met", flush=True)
"""


@pytest.mark.extended
def test_addresses_get_through_slurm_whatever_is_in_memory(slurm, tmp_path):
    program = script(tmp_path / "dense.py", DENSE_MEMORY)
    where = {"PYTHONPATH": str(REPO)} | slurm
    code, output = run("srun", "--mpi=pmi2", "--nodes=2", "--ntasks=4", sys.executable, program, timeout=60, **where)
    assert code == 0 and output.count("4 ranks met") == 4, output


WRONG = {
    "no MPI": (
        srun("none", 6),
        "srun started 6 tasks, but each is an MPI world of its own; use srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open",
    ),
    "too few": (srun("pmi2", 2), "2 MPI ranks were started (SLURM_NTASKS 2), the clients need 1 (phone) + 1 (laptop)"),
}


@pytest.mark.extended
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_srun_is_one_line_with_the_right_command(name, slurm, tmp_path):
    wrong, message = WRONG[name]
    code, output = run(*wrong, f"output={tmp_path}", **slurm)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and message in line and "Traceback" not in output
    assert "srun " in line and "--ntasks=6 python -u -m mpi4py launch/train.py" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extended
def test_mpiexec_inside_an_allocation(slurm, whole, tmp_path):
    """`python launch/train.py` in a batch script: MPICH's mpiexec finds the nodes and has srun start its ranks."""
    batch = script(tmp_path / "script", f'#!/bin/bash\nexec "$PYTHON" {TRAIN} "$@"\n')
    job = BatchJob(slurm, tmp_path, *ON_TWO_NODES, batch, *TWO_RANKS, f"output={tmp_path}")
    assert job.end() == 0, job.output
    assert metrics(tmp_path) == whole


def test_shell_scripts_are_sound():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    scripts = sorted(str(path) for path in (REPO / "slurm").glob("*.sbatch"))
    assert len(scripts) > 1
    subprocess.run([shellcheck, *scripts], check=True)
