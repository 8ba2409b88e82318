"""Variables that launchers have left behind: named in one line, while those of launchers that run are left alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import REPO, clean_environment
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching import left_over

TRAIN = ["launch/train.py", "output=/nonexistent"]


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=REPO, env=clean_environment() | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"LOCAL_RANK": "1"},
            "LOCAL_RANK=1: set, but neither DeepSpeed's nor torch's launcher nor srun has started",
        ),
        ({"PMI_RANK": "1", "PMI_FD": "40"}, "PMI_FD: 40 names a connection to mpiexec that is not open"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK: 1 is set, but no variable says how to reach mpiexec"),
    ],
)
def test_the_command_says_what_was_left_over(environment, line):
    done = start(*TRAIN, **environment)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {line}"), done
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_launchers_second_process_leaves_in_silence(tmp_path):
    """Started by a program called torchrun, and by one that adds DeepSpeed's option."""
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)\n"
    )
    for command in ([str(launcher), *TRAIN], [*TRAIN, "--local_rank=1"]):
        done = start(*command, LOCAL_RANK="1")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_variable_that_was_found_is_named():
    with pytest.raises(UserError, match=r"^LOCAL_RANK=2 GROUP_RANK=1: set.*env -u LOCAL_RANK -u CROSS_RANK"):
        left_over.check_launcher_runs({"LOCAL_RANK": "2", "CROSS_RANK": "0", "GROUP_RANK": "1"}, ["t.py"])


@pytest.fixture
def open_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_living_process_manager_is_believed(tmp_path, open_port):
    ours, theirs = socket.socketpair()
    uri = f"x@0.0;tcp4://127.0.0.1:{open_port}"
    for environment in (
        {},
        {"PMI_RANK": "1", "PMI_FD": str(ours.fileno())},
        {"PMI_RANK": "1", "PMI_PORT": "host:1"},
        {"PMIX_RANK": "1", "PMIX_SERVER_URI4": "x;tcp4://127.0.0.1:1", "PMIX_SERVER_TMPDIR": str(tmp_path)},
        {"PMIX_RANK": "1", "PMIX_SERVER_URI41": uri, "PMIX_SERVER_TMPDIR": "/hidden", "OMPI_COMM_WORLD_RANK": "1"},
    ):
        left_over.check_process_manager(environment)
    ours.close()
    theirs.close()


def test_what_is_no_connection_is_refused():
    """Neither a text nor a descriptor of something else."""
    with Path(os.devnull).open() as file:
        for number in ["x", "", "-1", "99999999999999999999", str(file.fileno())]:
            with pytest.raises(UserError, match="PMI_FD: .*unset PMI_"):
                left_over.check_process_manager({"PMI_RANK": "0", "PMI_FD": number})


def test_a_server_that_has_ended_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gone = {"PMIX_RANK": "0", "PMIX_SERVER_TMPDIR": "/gone", "OMPI_COMM_WORLD_RANK": "0"}
    for uri in (f"x@0.0;tcp4://127.0.0.1:{port}", "x", "x;tcp4://127.0.0.1:port"):
        with pytest.raises(UserError, match="PMIX_SERVER_URI2: .*has ended.*unset OMPI_.* PMIX_"):
            left_over.check_process_manager(gone | {"PMIX_SERVER_URI2": uri})


@pytest.mark.parametrize("name", left_over.HOST_LISTS)
def test_lists_of_hosts_that_do_not_exist_are_named(name, tmp_path):
    (tmp_path / "nodes").write_text("n0\n")
    left_over.check_host_lists({name: str(tmp_path / "nodes")})
    with pytest.raises(UserError, match=f"^{name}: .*gone is the list of hosts of a job"):
        left_over.check_host_lists({name: str(tmp_path / "gone")})


def slurm(tmp_path, monkeypatch, scontrol: str | None):
    """Put an srun on the path, and a scontrol that runs these lines of a shell."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, lines in {"srun": "", "scontrol": scontrol}.items():
        if lines is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / name).chmod(0o755)


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "HOME": "/h"}


def test_a_running_job_is_believed(tmp_path, monkeypatch):
    slurm(tmp_path, monkeypatch, '[ "$*" = "show job 7 -o" ] && echo "JobId=7 JobState=RUNNING Reason=None"')
    assert left_over.without_dead_allocation(JOB, hostfile=False) == (JOB, "")
    assert left_over.without_dead_allocation({"HOME": "/h"}, hostfile=False) == ({"HOME": "/h"}, "")


@pytest.mark.parametrize(
    ("scontrol", "why"),
    [
        (None, "scontrol cannot be run"),
        (
            "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1",
            "scontrol says: slurm_load_jobs error: In",
        ),
        ("echo JobId=7 JobState=COMPLETED", "that job has ended"),
        ("exec /bin/sleep 60", "has not answered"),
    ],
)
def test_a_dead_allocation_is_told_and_left_out(tmp_path, monkeypatch, scontrol, why):
    monkeypatch.setattr(left_over, "CONTROLLER_SECONDS", 0.3)
    slurm(tmp_path, monkeypatch, scontrol)
    left, note = left_over.without_dead_allocation(JOB, hostfile=False)
    assert left == {"HOME": "/h"}
    assert note.startswith("note: SLURM_JOB_ID=7 is set, but ") and why in note and note.endswith("without Slurm")


def test_a_dead_allocation_of_several_nodes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="SLURM_JOB_NUM_NODES: 2 nodes cannot be reached .* srun is not on PATH"):
        left_over.without_dead_allocation(JOB | {"SLURM_JOB_NUM_NODES": "2"}, hostfile=False)
    left, note = left_over.without_dead_allocation(JOB | {"SLURM_JOB_NUM_NODES": "2"}, hostfile=True)
    assert left == {"HOME": "/h"} and "all ranks run on the hosts of --hostfile" in note


def test_no_ancestor_is_no_error(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 2**30)
    with pytest.raises(UserError, match="LOCAL_RANK=1"):
        left_over.check_launcher_runs({"LOCAL_RANK": "1"}, [])
