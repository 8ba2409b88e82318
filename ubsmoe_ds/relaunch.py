"""From a plain `deepspeed launch/train.py` on one host to one MPI world: the script re-executes itself under mpiexec.

Started that way each local process is an MPI world of its own (singletons cannot join later), so local rank 0 becomes
mpiexec and the other local ranks leave at once. The launcher waits for mpiexec and passes its exit code on.
`-m mpi4py` makes an exception in one rank abort the whole job; without it the others would wait for ever.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ubsmoe_ds.errors import UserError

# set by process managers of MPICH and Intel MPI (PMI), PMIx, and Open MPI
MPI_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
# set by the deepspeed launcher for its one-process world; the ranks make their own
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


def inside_mpi(environment: Mapping[str, str]) -> bool:
    """Whether a process manager started this process as one rank of an MPI job."""
    return any(name in environment for name in MPI_RANK_VARIABLES)


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for its job before there is a world: the first MPI rank, or the first local one."""
    names = MPI_RANK_VARIABLES if inside_mpi(environment) else ("LOCAL_RANK",)
    return next((environment[name] for name in names if name in environment), "0") == "0"


def mpi_command(
    script: str, arguments: Sequence[str], ranks: int, mpiexec: str = "mpiexec", python: str = "python"
) -> list[str]:
    """The command that starts `ranks` ranks of `script`; also what error messages recommend."""
    return [mpiexec, "-n", str(ranks), python, "-u", "-m", "mpi4py", script, *arguments]


def relaunch(script: str, arguments: Sequence[str], ranks: int) -> NoReturn:
    """Become mpiexec; local ranks other than the first have left before.

    Raises:
        UserError: if there is no mpiexec.
    """
    beside_python = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside_python) if beside_python.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise UserError("mpiexec: not found beside python or on PATH; install the wheel `mpich` or a system MPI")
    environment = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS_VARIABLES}
    # the script's folder is on a script's path, but the working folder is what `-m` adds
    root = str(Path(script).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # threads of all ranks together fill the cores; more would only get in each other's way
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = mpi_command(script, arguments, ranks, mpiexec, sys.executable)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)
