"""All ways in which a rank ends, and what each does to its client and to the job.

function           called by                        this rank          its client        the job
`end_together`     every remaining rank             ends with code     ends              ends with code
`end_after_error`  a rank after an error            if all ranks failed like `end_together`; else like `abort_job`, or
                                                    with ULFM like `die`
`abort_job`        one rank, for all                MPI's Abort        ends              ends with code (not with ULFM)
`end_host`         first rank of a host, when a     ends with 1        its ranks here    ends with 1 if it is reached;
                   host is lost                                        end               each host ends its own
`end_now`          a rank asked to stop twice       ends with 143      ends              ends with 143
`leave_job`        ranks whose client lost a rank   ends with 0        is lost           goes on (ULFM only)
`die`              a rank with an error of its own  SIGKILL            is lost           goes on (ULFM only)
its watcher        (launching/hang_watcher.py)      SIGKILL            like the job      ends with 1, goes on with ULFM

MPICH, and Open MPI without ULFM: mpiexec ends all ranks when one aborts or is killed, and returns its code. Ranks that
fail together call Finalize first: then their exit codes stand, and nobody has to be ended by force.
Open MPI with ULFM (`mpiexec --with-ft ulfm`, the config's fault_tolerance: shrink), found by trying: other ranks do not
notice one that ends with an exit code or by Abort, only one that is ended by a signal or leaves with 0. Finalize may
wait for ever after a death, so nobody calls it. mpiexec ends the job with the first exit code that is not 0, so its
rank leaves last.
Lost hosts, found by trying: after Abort MPICH's mpiexec ends at once with its code, but ranks on the other side of the
cut live on; they have to end themselves, and then their daemon ends too. Open MPI's daemons wait for each other for
ever, or where TCP gives a connection up end with any code, 0 too, and leave ranks behind; so each host kills its own
daemon, and its ranks end with that (`end_with_daemon`).
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NoReturn

import psutil
from mpi4py import MPI

from ubsmoe_ds.base.errors import EXIT_FAILURE, EXIT_TERMINATED
from ubsmoe_ds.launching.sign_in import sign_off
from ubsmoe_ds.launching.supervisor import end_with_parent
from ubsmoe_ds.mpi.collectives import DEATHS, POLL_SECONDS

ALL_FAILED_SECONDS = 10.0  # for all ranks to report an error that all of them have
MESSAGE_SECONDS = 0.3  # for mpiexec to forward a rank's last words before Abort ends it too
LAST_ONE_SECONDS = 0.3  # for the other ranks to leave before the one whose exit code counts
ABORT_SECONDS = 3.0  # for the launcher to end this rank
OPEN_MPI_DAEMONS = ("prted", "prterun", "prte")
BETWEEN = 3  # processes between such a daemon and a rank, at most: what starts a container, a script


def all_ranks_failed(seconds: float = ALL_FAILED_SECONDS) -> bool:
    """Return whether every rank of the job calls this within the time; then all can end together with the same code.

    The job's own messages travel on a duplicate of COMM_WORLD, so that this barrier cannot meet one of theirs.
    """
    deadline = time.monotonic() + seconds
    try:
        reached = MPI.COMM_WORLD.Ibarrier()
        while not reached.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
    except MPI.Exception as error:
        if error.Get_error_class() not in DEATHS:
            raise
        return False
    return True


def end_together(comm: MPI.Intracomm, code: int, survives: bool) -> int:
    """End the job on every remaining rank (a collective).

    Args:
        comm: communicator of the remaining ranks.
        code: the job's exit code.
        survives: whether the job survives deaths; then this does not return.

    Returns:
        The code, which the caller exits with.
    """
    if survives:
        _leave_last_with(comm, code)
    if code:
        MPI.Finalize()
    return code


def _leave_last_with(comm: MPI.Intracomm, code: int) -> NoReturn:
    """Leave with 0 on every rank but the first, which leaves last, with the code."""
    request = comm.Ibarrier()
    try:
        while not request.Test():
            time.sleep(POLL_SECONDS)
    except MPI.Exception as error:
        if error.Get_error_class() not in DEATHS:
            raise
    _flush()
    if comm.rank == 0:
        time.sleep(LAST_ONE_SECONDS)
        os._exit(code)
    os._exit(0)


def end_after_error(code: int, survives: bool, together: bool) -> int:
    """End the job after an error.

    Args:
        code: the job's exit code.
        survives: whether the job survives deaths; then this does not return, and the others go on unless all fail.
        together: whether every rank has failed (`all_ranks_failed`) and calls this; else the others end by force.

    Returns:
        The code, which the caller exits with.
    """
    sign_off(os.environ, code)
    if together:
        return end_together(MPI.COMM_WORLD, code, survives)
    if survives:
        die()
    abort_job(code)
    return code


def abort_job(code: int) -> None:
    """End every rank of the job by MPI's Abort, where one rank fails and the others cannot know."""
    time.sleep(MESSAGE_SECONDS)
    MPI.COMM_WORLD.Abort(code)


def end_now() -> NoReturn:
    """End this rank at once, and with it the job, saved or not."""
    os._exit(EXIT_TERMINATED)


def leave_job() -> NoReturn:
    """Leave with code 0, so that the ranks of the other clients go on."""
    _flush()
    os._exit(0)


def die() -> NoReturn:
    """Kill this rank, so that the ranks of the other clients notice and go on."""
    _flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def end_host(others: Sequence[int], cut_off: bool) -> NoReturn:
    """End all ranks of this host, and where it can be reached the job; called in the heartbeat's thread.

    Args:
        others: pidfds of the other ranks on this host.
        cut_off: whether the first host is out of reach, and with it perhaps whatever else would end them.
    """
    sign_off(os.environ, EXIT_FAILURE)
    daemon = open_mpi_daemon()
    if daemon is not None:
        with contextlib.suppress(OSError):  # it has just ended
            os.kill(daemon, signal.SIGKILL)
    else:
        if cut_off:  # first, as MPICH's Abort ends this process at once; else its code is the job's, not theirs
            _kill(others)
        threading.Thread(target=abort_job, args=[EXIT_FAILURE], daemon=True).start()
        time.sleep(ABORT_SECONDS)
    _kill(others)
    os._exit(EXIT_FAILURE)


def end_with_daemon() -> None:
    """Have the system kill this rank when Open MPI's daemon that started it ends; do nothing under other MPIs."""
    if open_mpi_daemon() is not None:
        end_with_parent(signal.SIGKILL)


def open_mpi_daemon() -> int | None:
    """Return the process id of Open MPI's daemon that started this rank; None if no such daemon did."""
    try:
        parents = psutil.Process().parents()[: BETWEEN + 1]
        return next((parent.pid for parent in parents if parent.name() in OPEN_MPI_DAEMONS), None)
    except psutil.Error:  # one of them has just ended
        return None


def _kill(handles: Iterable[int]) -> None:
    """Kill the processes of these pidfds, as far as possible."""
    for handle in handles:
        with contextlib.suppress(OSError):  # it has ended, or this is forbidden; this thread has more to do
            signal.pidfd_send_signal(handle, signal.SIGKILL)


def _flush() -> None:
    """Write out what was printed, which `os._exit` would drop."""
    sys.stdout.flush()
    sys.stderr.flush()
