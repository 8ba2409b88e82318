"""What has started this process, whether all that it started can be one MPI world, and the commands that make one.

Nothing here imports MPI. A process that no process manager of MPI started is a world of its own, and such worlds cannot
be joined later; so what cannot work is said at once, with the command that does.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig

# set by process managers of MPICH and Intel MPI (PMI), PMIx, and Open MPI
MPI_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# set by launchers of torch for their worlds; the ranks make their own
RENDEZVOUS_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
HOSTS_VARIABLES = ("CROSS_SIZE", "GROUP_WORLD_SIZE")  # of deepspeed's and torch's launchers on several hosts
HOST_RANK_VARIABLES = ("CROSS_RANK", "GROUP_RANK")
# what Open MPI's ranks on other hosts get from this environment beside its own variables; MPICH's get all of it
FORWARDED = (
    *("PYTHONPATH", "OMP_NUM_THREADS", "MKL_", "UBSMOE_DS_", "DS_", "TORCH_", "CUDA_"),
    *("GLOO_", "NCCL_", "UCX_", "FI_", "HF_", "TRANSFORMERS_", "TOKENIZERS_"),
)


def inside_mpi(environment: Mapping[str, str]) -> bool:
    """Whether a process manager started this process as one rank of an MPI job."""
    return any(name in environment for name in MPI_RANK_VARIABLES)


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for all that were started with it, before there is a world."""
    if inside_mpi(environment):
        return _value(environment, MPI_RANK_VARIABLES) == 0
    first_task = not is_task_of_srun(environment) or environment.get("SLURM_PROCID", "0") == "0"
    return first_task and _value(environment, ("LOCAL_RANK",)) == 0 == _value(environment, HOST_RANK_VARIABLES)


def is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process itself.

    In a batch script there is no step; MPICH's mpiexec has srun start daemons, whose ranks are no tasks.
    """
    return "SLURM_STEP_ID" in environment and "PMI_HOSTNAME" not in environment


def check_launcher(environment: Mapping[str, str], script: str, arguments: Sequence[str], ranks: int) -> None:
    """Refuse many processes that no MPI joins.

    Args:
        environment: of one that is not inside MPI.
        script, arguments: how it was started.
        ranks: that the clients need.

    Raises:
        UserError: with the command that works.
    """
    program = shlex.join(["python", "-u", "-m", "mpi4py", script, *arguments])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if is_task_of_srun(environment) and tasks > 1:
        raise UserError(
            f"world: srun started {tasks} tasks, but each is an MPI world of its own; use srun --mpi=pmi2 (MPICH) or "
            f"--mpi=pmix (Open MPI): srun --mpi=pmi2 --ntasks={ranks} {program}"
        )
    hosts = _value(environment, HOSTS_VARIABLES, default=1)
    if hosts > 1:
        raise UserError(
            f"world: this launcher started the script on {hosts} hosts by itself, and no MPI joins them; run: "
            f"{shlex.join(['python', script, '--hostfile', 'HOSTFILE', *arguments])}, or "
            "deepspeed --hostfile HOSTFILE --launcher mpich --force_multi --no_ssh_check --master_addr ADDRESS ..."
        )


def check_size(
    environment: Mapping[str, str],
    size: int,
    library: str,
    script: str,
    arguments: Sequence[str],
    clients: Sequence[ClientConfig],
) -> None:
    """Whether the MPI world has all that were started, and as many ranks as the clients need.

    Args:
        environment: of a rank.
        size: of its MPI world.
        library: which MPI this is.
        script, arguments: how it was started.
        clients: of the job.

    Raises:
        UserError: with the command that works.
    """
    ranks = sum(client.ranks for client in clients)
    started = _value(environment, MPI_SIZE_VARIABLES, default=0)
    if not started and is_task_of_srun(environment):
        started = int(environment.get("SLURM_STEP_NUM_TASKS", "0"))
    command = shlex.join(mpi_command(script, arguments, ranks))
    if started > 1 and size == 1:
        raise UserError(
            f"world: {started} processes were started, but each is an MPI world of its own: mpi4py's MPI is "
            f"{library}, and what started them belongs to another; use its own mpiexec: {command}"
        )
    if size != ranks:
        tasks = f" (SLURM_NTASKS {environment['SLURM_NTASKS']})" if is_task_of_srun(environment) else ""
        if tasks:
            plugin = "pmix" if "Open MPI" in library else "pmi2"
            command = f"srun --mpi={plugin} --ntasks={ranks} " + command.partition(f"-n {ranks} ")[2]
        need = " + ".join(f"{client.ranks} ({client.name})" for client in clients)
        raise UserError(
            f"world: {size} MPI ranks were started{tasks}, the clients need {need} = {ranks}; run: {command}"
        )


def mpi_command(
    script: str,
    arguments: Sequence[str],
    ranks: int,
    *,
    mpiexec: str = "mpiexec",
    python: str = "python",
    hosts: Mapping[str, int] | None = None,
    through: Sequence[str] = (),
) -> list[str]:
    """The command that starts `ranks` ranks of `script`; also what error messages recommend.

    Args:
        script, arguments, ranks: the job.
        mpiexec, python: programs.
        hosts: ranks of each host; None: as mpiexec finds them, which knows Slurm's allocations.
        through: words that go before the command of a rank (fast_start.py).
    """
    where = [] if hosts is None else ["-hosts", _slots(hosts)]
    return [mpiexec, *where, "-n", str(ranks), *through, python, "-u", "-m", "mpi4py", script, *arguments]


def open_mpi_command(
    script: str,
    arguments: Sequence[str],
    ranks: int,
    *,
    mpiexec: str,
    python: str,
    hosts: Mapping[str, int] | None = None,
    survive: bool = False,
    forwarded: Iterable[str] = (),
) -> list[str]:
    """The same under Open MPI, which keeps ranks to cores, and root away, unless told otherwise.

    Args:
        survive: whether the job goes on when ranks die; then without `-m mpi4py`, whose way of ending a job the other
            ranks would not see (survival.py).
        forwarded: variables of the environment, of which other hosts get those that matter to us.
    """
    options = ["--map-by", ":oversubscribe", "--bind-to", "none"]
    if survive:
        options = ["--with-ft", "ulfm", *options]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    if hosts is not None:
        options += ["--host", _slots(hosts)]
        options += [text for name in sorted(forwarded) if name.startswith(FORWARDED) for text in ("-x", name)]
    module = [] if survive else ["-m", "mpi4py"]
    return [mpiexec, *options, "-n", str(ranks), python, "-u", *module, script, *arguments]


def is_open_mpi(mpiexec: str) -> bool:
    """Whether it starts jobs of Open MPI."""
    said = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    return "Open MPI" in said or "prte" in said.lower()


def _slots(hosts: Mapping[str, int]) -> str:
    return ",".join(f"{host}:{count}" for host, count in hosts.items())


def _value(environment: Mapping[str, str], names: Sequence[str], default: int = 0) -> int:
    """The first of some variables that is set."""
    found = (int(environment[name]) for name in names if environment.get(name, "").isdecimal())
    return next(found, default)
