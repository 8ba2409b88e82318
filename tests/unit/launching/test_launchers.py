"""Launchers are recognised by the environment, and wrong launches are refused with the command that works."""

import socket

import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.launching import launchers
from ubsmoe_ds.mpi import start

CLIENTS = [ClientConfig(name="a", budget=1.0, ranks=2), ClientConfig(name="b", budget=1.0, ranks=4)]


TASK_OF_SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6", "SLURM_PROCID": "0"}


def test_each_process_manager_is_known():
    assert not launchers.inside_mpi({"RANK": "0", "WORLD_SIZE": "4"})
    for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        assert launchers.inside_mpi({name: "0"})


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"PMI_RANK": "0", "LOCAL_RANK": "3"}, True),
        ({"PMI_RANK": "2"}, False),
        (TASK_OF_SRUN, True),
        (TASK_OF_SRUN | {"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, True),  # a batch script
        ({"LOCAL_RANK": "0", "CROSS_RANK": "1"}, False),  # deepspeed on a second host
        ({"LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun on a second host
    ],
)
def test_one_process_speaks(environment, first):
    assert launchers.is_first(environment) is first


@pytest.mark.parametrize("text", ["x", "1.5", "-1", "٣", "9" * 5000])
@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_PROCID", "CROSS_RANK", "PMI_RANK"])
def test_a_variable_that_is_no_number_is_named(name, text):
    with pytest.raises(UserError, match=rf"^{name}: .* is no number"):
        launchers.is_first({"SLURM_STEP_ID": "0", name: text})


def test_a_number_of_tasks_that_is_none_is_named():
    assert refused(TASK_OF_SRUN | {"SLURM_STEP_NUM_TASKS": "4(x2)"}).startswith("SLURM_STEP_NUM_TASKS: '4(x2)' is no")


def refused(environment: dict[str, str]) -> str:
    with pytest.raises(UserError) as error:
        launchers.check_launcher(environment, "launch/train.py", ["seed=1"], 6)
    return str(error.value)


def test_many_worlds_of_one_are_refused():
    assert refused(TASK_OF_SRUN) == (
        "world: srun started 6 tasks, but each is an MPI world of its own; use srun --mpi=pmi2 (MPICH) or --mpi=pmix "
        "(Open MPI): srun --mpi=pmi2 --ntasks=6 python -u -m mpi4py launch/train.py seed=1"
    )
    for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE"):
        assert "2 hosts by itself, and no MPI joins them; run: python launch/train.py --hostfile" in refused(
            {name: "2"}
        )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CROSS_SIZE": "1", "WORLD_SIZE": "4"},  # deepspeed on one host
        {"SLURM_NTASKS": "6", "SLURM_PROCID": "0"},  # in a batch script: mpiexec knows the allocation
        TASK_OF_SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty
    ],
)
def test_one_process_may_start_mpiexec(environment):
    launchers.check_launcher(environment, "launch/train.py", [], 6)


@pytest.mark.parametrize(
    ("environment", "size", "message"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "6"},
            1,
            "6 processes were started, but each is an MPI world of its own: .*MPICH 5.0",
        ),
        (TASK_OF_SRUN | {"PMI_SIZE": "4", "PMI_HOSTNAME": "n0"}, 4, "were started, the clients need .* run: mpiexec"),
        (TASK_OF_SRUN | {"PMIX_RANK": "0"}, 1, "6 processes were started, but each is"),
        (
            {"PMI_SIZE": "4"},
            4,
            "4 MPI ranks were started, the clients need 2 .a. . 4 .b. = 6; run: mpiexec -n 6 python -u -m mpi4py t.py",
        ),
        (
            TASK_OF_SRUN | {"PMI_SIZE": "4", "SLURM_NTASKS": "4"},
            4,
            r"4 MPI ranks were started \(SLURM_NTASKS 4\), the clients need .*; run: srun --mpi=pmi2 --ntasks=6 python",
        ),
    ],
)
def test_a_world_of_another_size_is_refused(environment, size, message):
    with pytest.raises(UserError, match=message):
        launchers.check_size(environment, size, "MPICH 5.0.2", "t.py", [], CLIENTS)


def test_the_right_size_is_not_refused():
    launchers.check_size({"PMI_SIZE": "6"}, 6, "MPICH 5.0.2", "t.py", [], CLIENTS)


def ask(rank: socket.socket, manager: socket.socket, answer: bytes) -> bytes:
    """Return the answer that a rank gets when it asks how long values may be."""
    rank.sendall(b"cmd=get_maxes\n")
    assert manager.recv(100) == b"cmd=get_maxes\n"
    manager.sendall(answer)
    return rank.recv(100)


def test_values_are_shorter_while_mpi_starts():
    """Slurm allows 1,024 characters and cannot read them; a smaller limit is kept."""
    answer = b"cmd=maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=%d\n"
    rank, slurm = socket.socketpair()
    with rank, slurm:
        with start._short_values(rank.fileno()):
            assert ask(rank, slurm, answer % 1024) == answer % 900
            assert ask(rank, slurm, answer % 512) == answer % 512
        assert ask(rank, slurm, answer % 1024) == answer % 1024


def test_hosts_are_given_to_each_mpiexec():
    hosts = {"n0": 4, "n1": 2}
    names = ["CUDA_VISIBLE_DEVICES", "PYTHONPATH", "UCX_TLS"]
    line = " ".join(launchers.mpi_command("t.py", ["seed=1"], 6, hosts=hosts))
    assert line.startswith("mpiexec -hosts n0:4,n1:2 -n 6 python ")
    command = launchers.open_mpi_command(
        "t.py",
        [],
        6,
        mpiexec="mpiexec",
        python="python",
        hosts=hosts,
        forwarded=names,
    )
    text = " ".join(command)
    assert "--host n0:4,n1:2 -x CUDA_VISIBLE_DEVICES -x PYTHONPATH -x UCX_TLS -n 6" in text
    assert "-m mpi4py" in text and "ulfm" not in text
    survive = launchers.open_mpi_command("t.py", [], 6, mpiexec="mpiexec", python="python", survive=True)
    assert "--with-ft ulfm" in " ".join(survive) and "mpi4py" not in survive


def test_no_token_leaves_the_host_unless_it_is_asked_for():
    environment = dict.fromkeys(
        [
            *("PATH", "PYTHONPATH", "LC_ALL", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HOME", "NCCL_DEBUG"),
            *(
                "MAIL",
                "SSH_CLIENT",
                "AWS_SECRET_ACCESS_KEY",
                "WANDB_API_KEY",
                "LD_PRELOAD",
                "HTTPS_PROXY",
                "MY_VARIABLE",
            ),
            *("HF_TOKEN", "HF_HUB_TOKEN", "UBSMOE_DS_API_KEY", "CONDA_TOKEN", "hf_token", "UCX_PASS", "PGPASSWORD"),
        ],
        "value",
    )
    passed = launchers.forwarded(environment, [])
    assert passed == sorted(
        ["PATH", "PYTHONPATH", "LC_ALL", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HOME", "NCCL_DEBUG"]
    )
    assert launchers.forwarded(environment | {"SSH_AUTH_SOCK": "x"}, []) == sorted([*passed, "SSH_AUTH_SOCK"])
    assert launchers.forwarded(environment, ["HF_TOKEN", "PATH"]) == sorted([*passed, "HF_TOKEN"])
    with pytest.raises(UserError, match="--forward-env: HF_TOKE is not set; correct the name, or set it"):
        launchers.forwarded(environment, ["HF_TOKE"])
