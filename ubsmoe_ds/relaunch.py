"""From a plain `deepspeed launch/train.py` on one host to one MPI world: the script re-executes itself under mpiexec.

Started that way each local process is an MPI world of its own (singletons cannot join later), so local rank 0 runs
mpiexec and the other local ranks leave at once. Its exit code is passed on.
`-m mpi4py` makes an exception in one rank abort the whole job; without it the others would wait for ever.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ubsmoe_ds.errors import EXIT_INTERRUPTED, UserError

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

PARENT_SPEAKS = "UBSMOE_DS_PARENT_SPEAKS"  # set for ranks whose parent is `relaunch`


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


def relaunch(script: str, arguments: Sequence[str], ranks: int) -> int:
    """Run the script again under mpiexec and return its exit code; local ranks other than the first have left before.

    This process stays to speak for the job when it is interrupted: what ranks print then may be lost with mpiexec.

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
    environment[PARENT_SPEAKS] = "1"
    interrupted: list[int] = []

    def stop(signal_number: int, _: object) -> None:
        if not interrupted:
            os.write(sys.stderr.fileno(), b"error: interrupted\n")
        interrupted.append(signal_number)
        if signal_number == signal.SIGTERM:  # a terminal's Ctrl-C reaches mpiexec and the ranks by itself
            process.terminate()

    process = subprocess.Popen(mpi_command(script, arguments, ranks, mpiexec, sys.executable), env=environment)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, stop)
    code = process.wait()
    return EXIT_INTERRUPTED if interrupted else code
