"""Find out what started this process, refuse launches that cannot become one MPI world, and build commands that do.

Nothing here imports MPI. A process that was not started by a process manager of MPI is a world of its own, and such
worlds cannot be joined later; so a launch that cannot work is refused at once, with the command that works.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.population import Trainer, kind_of

# set by the process managers of MPICH and Intel MPI (PMI), PMIx, and Open MPI
MPI_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# set by torch's and DeepSpeed's launchers for their own world; our ranks make theirs
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
HOSTS_VARIABLES = ("CROSS_SIZE", "GROUP_WORLD_SIZE")  # number of hosts, from DeepSpeed's and torch's launchers
HOST_RANK_VARIABLES = ("CROSS_RANK", "GROUP_RANK")
# beginnings of variables that ranks on other hosts get: what programs and libraries need, nothing of the user's own
FORWARDED = (
    *("PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_", "TMPDIR", "LANG", "LC_"),
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "UBSMOE_DS_", "DS_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_", "NVIDIA_"),
    *("GLOO_", "NCCL_", "UCX_", "FI_", "MPICH_", "MPIR_", "OMPI_", "PRTE_", "PMIX_MCA_", "I_MPI_", "HYDRA_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_"),
)
# what mpiexec's ssh needs on the host where it is started
OF_SSH = ("HOME", "USER", "LOGNAME", "SHELL", "TERM", "SSH_AUTH_SOCK", "KRB5CCNAME")
# parts of names of variables that are not passed on although they begin like that, such as HF_TOKEN
SECRETS = {"TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASS", "CREDENTIAL", "CREDENTIALS", "AUTH"}


def inside_mpi(environment: Mapping[str, str]) -> bool:
    """Return whether a process manager started this process as one rank of an MPI job."""
    return any(name in environment for name in MPI_RANK_VARIABLES)


def started_as(environment: Mapping[str, str]) -> int:
    """Return the number that the process manager of MPI gave this process; 0 if none started it.

    Raises:
        UserError: if it is no number.
    """
    return _value(environment, MPI_RANK_VARIABLES)


def is_first(environment: Mapping[str, str]) -> bool:
    """Return whether this process speaks for all that were started with it, before there is a world.

    Raises:
        UserError: if a variable of a launcher is no number.
    """
    if inside_mpi(environment):
        return started_as(environment) == 0
    first_task = not is_task_of_srun(environment) or _value(environment, ("SLURM_PROCID",)) == 0
    return first_task and _value(environment, ("LOCAL_RANK",)) == 0 == _value(environment, HOST_RANK_VARIABLES)


def is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process itself.

    A batch script has no step. MPICH's mpiexec has srun start daemons, whose ranks are not tasks of srun.
    """
    return "SLURM_STEP_ID" in environment and "PMI_HOSTNAME" not in environment


def check_launcher(environment: Mapping[str, str], script: str, arguments: Sequence[str], ranks: int) -> None:
    """Refuse a launch of many processes that no MPI joins.

    Args:
        environment: that of a process outside MPI.
        script, arguments: how it was started.
        ranks: number of ranks that the clients need.

    Raises:
        UserError: with the command that works.
    """
    program = shlex.join(["python", "-u", "-m", "mpi4py", script, *arguments])
    tasks = _value(environment, ("SLURM_STEP_NUM_TASKS",), default=1)
    if is_task_of_srun(environment) and tasks > 1:
        raise UserError(
            f"world: srun started {tasks} tasks, but each is an MPI world of its own; use srun --mpi=pmi2 (MPICH) or "
            f"--mpi=pmix (Open MPI): srun --mpi=pmi2 --ntasks={ranks} {program}"
        )
    hosts = _value(environment, HOSTS_VARIABLES, default=1)
    if hosts > 1:
        name = next(name for name in HOSTS_VARIABLES if environment.get(name))
        raise UserError(
            f"world: this launcher ({name}={hosts}) started the script on {hosts} hosts by itself, and no MPI joins "
            "them; run: "
            f"{shlex.join(['python', script, '--hostfile', 'HOSTFILE', *arguments])}, or "
            "deepspeed --hostfile HOSTFILE --launcher mpich --force_multi --no_ssh_check --master_addr ADDRESS ..."
        )


def check_size(
    environment: Mapping[str, str],
    size: int,
    library: str,
    script: str,
    arguments: Sequence[str],
    clients: Sequence[Trainer],
) -> None:
    """Check that the MPI world holds all processes that were started, and as many ranks as the clients need.

    Args:
        environment: a rank's.
        size: number of ranks in its MPI world.
        library: name and version of its MPI.
        script, arguments: how it was started.
        clients: all clients, or groups, of the job.

    Raises:
        UserError: if it does not, with the command that works.
    """
    ranks = sum(client.ranks for client in clients)
    started = _value(environment, MPI_SIZE_VARIABLES, default=0)
    if not started and is_task_of_srun(environment):
        started = _value(environment, ("SLURM_STEP_NUM_TASKS",))
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
            f"world: {size} MPI ranks were started{tasks}, the {kind_of(clients[0])}s need {need} = {ranks}; run: "
            f"{command}"
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
    """Return the command that starts `ranks` ranks of `script` under MPICH; error messages recommend it too.

    Args:
        script, arguments, ranks: the job.
        mpiexec, python: programs.
        hosts: number of ranks on each host; None: mpiexec decides, which knows Slurm's allocations.
        through: words that go before the command of a rank (fast_start.py).
    """
    where = (
        []
        if hosts is None
        else [
            "-hosts",
            _slots(hosts),
        ]
    )
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
    through: Sequence[str] = (),
) -> list[str]:
    """Return the same command under Open MPI, which binds ranks to cores and refuses root unless told otherwise.

    Args:
        script, arguments, ranks, mpiexec, python, hosts, through: as for `mpi_command`.
        survive: whether the job goes on when ranks die; then without `-m mpi4py`, which ends a failed rank in a way
            that the other ranks do not notice (mpi/exits.py).
        forwarded: with hosts: names of the variables that ranks on others get.
    """
    options = ["--map-by", ":oversubscribe", "--bind-to", "none"]
    if survive:
        options = ["--with-ft", "ulfm", *options]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    if hosts is not None:
        options += ["--host", _slots(hosts)]
        options += [text for name in forwarded for text in ("-x", name)]
    module = [] if survive else ["-m", "mpi4py"]
    return [mpiexec, *options, "-n", str(ranks), *through, python, "-u", *module, script, *arguments]


def forwarded(environment: Mapping[str, str], asked: Sequence[str]) -> list[str]:
    """Return the names of the variables that ranks of several hosts get: no tokens or keys, unless they are asked for.

    MPICH passes on all that its mpiexec has, Open MPI those that are named.

    Args:
        environment: of the command.
        asked: further names, from --forward-env.

    Raises:
        UserError: for a name that is not set.
    """
    for name in asked:
        if name not in environment:
            raise UserError(f"--forward-env: {name} is not set; correct the name, or set it")
    known = {name for name in environment if name.startswith(FORWARDED) and not SECRETS & set(name.upper().split("_"))}
    return sorted({*known, *asked, *(name for name in OF_SSH if name in environment)})


def is_open_mpi(mpiexec: str) -> bool:
    """Return whether this mpiexec starts jobs of Open MPI."""
    version = _version(mpiexec)
    return "Open MPI" in version or "prte" in version.lower()


def is_mpich(mpiexec: str) -> bool:
    """Return whether this mpiexec starts jobs of MPICH; Intel MPI's, which derives from it, does not."""
    version = _version(mpiexec)
    return "HYDRA" in version and "Intel" not in version


def _version(mpiexec: str) -> str:
    """Return what mpiexec prints of itself."""
    return subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout


def _slots(hosts: Mapping[str, int]) -> str:
    """Return hosts and their numbers of ranks as mpiexec takes them, such as n0:4,n1:2."""
    return ",".join(f"{host}:{count}" for host, count in hosts.items())


def _value(environment: Mapping[str, str], names: Sequence[str], default: int = 0) -> int:
    """Return the number that the first of these variables which is set stands for.

    Raises:
        UserError: if it is no number.
    """
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        return default
    text = environment[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(f"{name}: {text[:40]!r} is no number, as a launcher would set it; unset {name}")
    return int(text)
