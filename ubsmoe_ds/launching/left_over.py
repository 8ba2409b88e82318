"""Notice variables of launchers that are not there, before MPI or a launcher waits for them in vain.

They come from a shell, a container or a notebook that was started inside a job which has ended, or whose launcher
cannot be reached from here.
"""

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ubsmoe_ds.base.errors import UserError

NOT_FIRST = ("LOCAL_RANK", "CROSS_RANK", "GROUP_RANK", "SLURM_PROCID")  # above 0 in all but a launcher's first process
# programs and modules that start one process for each device, as they stand in a command line
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "accelerate"}
# files of batch systems that list the hosts of an allocation; MPICH and Open MPI read them unasked
HOST_LISTS = ("PBS_NODEFILE", "PE_HOSTFILE", "COBALT_NODEFILE", "LSB_DJOB_HOSTFILE", "HYDRA_HOST_FILE")
CONNECT_SECONDS = 2.0
CONTROLLER_SECONDS = 15.0  # for Slurm's controller to answer
LIVING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


def check_launcher_runs(environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Refuse variables that make this process a launcher's second one, where no launcher has started it.

    Such a process leaves the job to the first one, and would end without having done anything.

    Args:
        environment: of this process.
        arguments: its command line; DeepSpeed's launcher adds `--local_rank`.

    Raises:
        UserError: naming the variables.
    """
    words = [*arguments, *(word for line in _ancestors() for word in line)]
    if any(word.startswith(("--local_rank", "slurmstepd:")) or Path(word).name in LAUNCHERS for word in words):
        return
    found = [f"{name}={environment[name]}" for name in NOT_FIRST if environment.get(name, "0") != "0"]
    unset = " ".join(f"-u {name}" for name in NOT_FIRST)
    raise UserError(
        f"{' '.join(found)}: set, but neither DeepSpeed's nor torch's launcher nor srun has started this process; to "
        f"start the job from here: env {unset} python ..."
    )


def _ancestors() -> Iterator[list[str]]:
    """Yield the command lines of the processes above this one, as far as this user may read them."""
    pid = os.getppid()
    while pid > 0:
        folder = Path(f"/proc/{pid}")
        try:
            yield [word.decode(errors="replace") for word in (folder / "cmdline").read_bytes().split(b"\0")]
            pid = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended, or there is no /proc
            return


def check_process_manager(environment: Mapping[str, str]) -> None:
    """Refuse variables of an MPI rank in a process that no process manager has started, or whose own is gone.

    MPI would end such a process with a dump, or make it a world of its own.

    Raises:
        UserError: naming the variable.
    """
    managed = {name for name in environment if name.startswith(("PMI_", "PMIX_"))}
    if "PMI_FD" in managed and not _is_socket(environment["PMI_FD"]):
        raise _gone("PMI_FD", environment, "names a connection to mpiexec that is not open in this process")
    addresses = sorted(name for name in managed if name.startswith("PMIX_SERVER_URI"))
    # a container may hide the folder and still reach the server; asking every server would cost each rank a connection
    hidden = addresses and not os.path.isdir(environment.get("PMIX_SERVER_TMPDIR", "/"))  # noqa: PTH112  # never raises
    if hidden and not any(_answers(environment[name]) for name in addresses):
        raise _gone(addresses[0], environment, "is the address of a server that has ended")
    if managed and managed <= {"PMI_RANK", "PMI_SIZE"}:
        raise _gone(min(managed), environment, "is set, but no variable says how to reach mpiexec")
    if "OMPI_COMM_WORLD_RANK" in environment and not managed:
        raise _gone("OMPI_COMM_WORLD_RANK", environment, "is set, but no variable says how to reach mpiexec")


def _gone(name: str, environment: Mapping[str, str], why: str) -> UserError:
    """Return the error about a variable that was left over."""
    prefixes = " ".join(sorted({f"{key.split('_')[0]}_*" for key in environment if key.startswith(("PMI", "OMPI_"))}))
    return UserError(f"{name}: {environment[name]} {why}; it is left over from another job: unset {prefixes}")


def _is_socket(number: str) -> bool:
    """Return whether a descriptor is open and one end of a socket."""
    try:
        return stat.S_ISSOCK(os.fstat(int(number)).st_mode)
    except (OSError, ValueError, OverflowError):
        return False


def _answers(address: str) -> bool:
    """Return whether something listens at an address of PMIx such as NAMESPACE;tcp4://127.0.0.1:5000."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def check_host_lists(environment: Mapping[str, str]) -> None:
    """Refuse variables of batch systems that name lists of hosts which do not exist here.

    Raises:
        UserError: naming the variable.
    """
    for name in HOST_LISTS:
        if name in environment and not os.path.isfile(environment[name]):  # noqa: PTH113  # never raises
            raise UserError(
                f"{name}: {environment[name]} is the list of hosts of a job, and is not a file here; unset {name} "
                "to run on this host alone"
            )


def dead_allocation(environment: Mapping[str, str]) -> str:
    """Return why the allocation of Slurm that the variables name cannot be used; empty if it can, or there is none."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return ""
    if shutil.which("srun") is None:
        return "srun is not on PATH"
    try:
        asked = subprocess.run(
            ["scontrol", "show", "job", job, "-o"],
            capture_output=True,
            text=True,
            timeout=CONTROLLER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"Slurm's controller has not answered for {CONTROLLER_SECONDS:.0f} s"
    except OSError as error:
        return f"scontrol cannot be run ({error.strerror})"
    if asked.returncode != 0:
        return f"scontrol says: {(asked.stderr.strip() or str(asked.returncode)).splitlines()[-1]}"
    if not any(f"JobState={state}" in asked.stdout for state in LIVING_STATES):
        return "that job has ended"
    return ""


def without_dead_allocation(environment: Mapping[str, str], hostfile: bool) -> tuple[dict[str, str], str]:
    """Return the environment without the variables of an allocation that cannot be used, and a line that says so.

    MPICH and Open MPI would otherwise start their daemons by srun, and wait for ever where it fails.

    Args:
        environment: of this process.
        hostfile: whether the user names the hosts.

    Raises:
        UserError: if the allocation has several nodes and nobody else names hosts: this one cannot stand for them.
    """
    why = dead_allocation(environment)
    if not why:
        return dict(environment), ""
    found = f"SLURM_JOB_ID={environment['SLURM_JOB_ID']} is set, but {why}"
    nodes = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", "1"))
    if nodes != "1" and not hostfile:
        raise UserError(
            f"SLURM_JOB_NUM_NODES: {nodes} nodes cannot be reached from here: {found}; start the job where srun works, "
            "give --hostfile, or unset SLURM_*"
        )
    left = {key: value for key, value in environment.items() if not key.startswith("SLURM_")}
    return (
        left,
        f"note: {found}; all ranks run on {'the hosts of --hostfile' if hostfile else 'this host'}, without Slurm",
    )
