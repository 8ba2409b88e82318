"""Whether a job is asked to stop: signals, and the word of them that ranks pass on."""

import signal
import threading
import time

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.launching.supervisor import STOP_SIGNALS
from ubsmoe_ds.mpi.collectives import DEATHS, RanksLost
from ubsmoe_ds.mpi.exits import end_now

SAME_SIGNAL_SECONDS = 2.0  # a launcher and its process group may bring one signal twice


class StopRequests:
    """Whether the job is asked to stop: by a signal to this rank, or by word of another rank that got one.

    The first SIGUSR1 or SIGTERM only asks; ranks look at `poll` where they can stop. A second one, or the end of the
    grace time, ends this rank at once and with it the job. The rank that got the signal tells all others, whatever it
    is waiting for, so that a signal to one rank of a job is enough.

    Args:
        comm: of the whole job; a copy is made, whose messages meet no others (a collective).
        grace_seconds: from the first signal to the end; None: as long as it takes.
    """

    def __init__(self, comm: MPI.Intracomm, grace_seconds: float | None) -> None:
        self.comm, self.grace_seconds = comm.Dup(), grace_seconds
        self._asked_at: float | None = None
        self._word = np.zeros(1, dtype=np.int32)
        self._listening = self.comm.Irecv(self._word, source=MPI.ANY_SOURCE)
        self._sent: list[MPI.Request] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def poll(self) -> bool:
        """Whether to stop; costs a microsecond."""
        listening = self._asked_at is None and self._listening != MPI.REQUEST_NULL
        try:
            if listening and self._listening.Test():
                self._ask(tell=False)
        except MPI.Exception as error:
            if error.Get_error_class() not in DEATHS:
                raise
            self._listening = MPI.REQUEST_NULL  # the survivors will listen on a communicator of their own
        return self._asked_at is not None

    def listen_on(self, comm: MPI.Intracomm) -> None:
        """Go on among survivors (a collective over them)."""
        try:
            self.comm = comm.Dup()
            self._listening = self.comm.Irecv(self._word, source=MPI.ANY_SOURCE)
        except MPI.Exception as error:  # which class it has then is no matter: `recover` finds out who is left
            raise RanksLost(str(error)) from error
        if self._asked_at is not None:
            self._tell()

    def close(self) -> None:
        """Listen no longer; MPI must not end with an open request, and complains of messages that nobody took."""
        if self._listening != MPI.REQUEST_NULL and not self._listening.Test():
            self._listening.Cancel()
            self._listening.Wait()
        while self.comm.Iprobe(source=MPI.ANY_SOURCE):  # Slurm signals every rank, and each has told all others
            self.comm.Recv(self._word, source=MPI.ANY_SOURCE)

    def _handle(self, number: int, _: object) -> None:
        """Python runs this between two of its instructions, so never within a call of MPI."""
        now = time.monotonic()
        if self._asked_at is None:
            self._ask(tell=True)
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            end_now()

    def _ask(self, tell: bool) -> None:
        self._asked_at = time.monotonic()
        if tell:
            self._tell()
        if self.grace_seconds is not None:
            timer = threading.Timer(self.grace_seconds, end_now)
            timer.daemon = True
            timer.start()

    def _tell(self) -> None:
        others = (rank for rank in range(self.comm.size) if rank != self.comm.rank)
        try:
            self._sent = [self.comm.Isend(self._word, dest=rank) for rank in others]
        except MPI.Exception as error:
            if error.Get_error_class() not in DEATHS:
                raise
