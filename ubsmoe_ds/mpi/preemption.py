"""Requests to stop a job: signals to any rank, which that rank passes on to all others."""

import signal
import threading
import time

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.launching.supervisor import STOP_SIGNALS
from ubsmoe_ds.mpi.collectives import DEATHS, RanksLost
from ubsmoe_ds.mpi.exits import end_now

SAME_SIGNAL_SECONDS = 2.0  # a launcher and its process group may deliver one signal twice


class StopRequests:
    """Notice that the job is asked to stop, by a signal to this rank or by a message from a rank that got one.

    The first SIGUSR1 or SIGTERM only asks; ranks call `poll` where they can stop. A second one, or the end of the
    grace time, ends this rank at once and with it the job. The rank that got the signal tells all others, whatever it
    is waiting for, so that a signal to one rank of a job is enough.

    Args:
        comm: communicator of the whole job; it is duplicated, so that its messages meet no others (a collective).
        grace_seconds: time from the first signal to the end; None: no limit.
    """

    def __init__(self, comm: MPI.Intracomm, grace_seconds: float | None) -> None:
        self.comm, self.grace_seconds = comm.Dup(), grace_seconds
        self._asked_at: float | None = None
        self._message = np.zeros(1, dtype=np.int32)
        self._listening = self.comm.Irecv(self._message, source=MPI.ANY_SOURCE)
        self._sent: list[MPI.Request] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def poll(self) -> bool:
        """Return whether to stop; costs a microsecond."""
        listening = self._asked_at is None and self._listening != MPI.REQUEST_NULL
        try:
            if listening and self._listening.Test():
                self._ask(tell=False)
        except MPI.Exception as error:
            if error.Get_error_class() not in DEATHS:
                raise
            self._listening = MPI.REQUEST_NULL  # `listen_on` will go on with a communicator of the remaining ranks
        return self._asked_at is not None

    def listen_on(self, comm: MPI.Intracomm) -> None:
        """Go on with the remaining ranks (a collective).

        Args:
            comm: communicator of the remaining ranks.

        Raises:
            RanksLost: if another rank has died.
        """
        try:
            self.comm = comm.Dup()
            self._listening = self.comm.Irecv(self._message, source=MPI.ANY_SOURCE)
        except MPI.Exception as error:  # of whatever class: `recover` finds out who is left
            raise RanksLost(str(error)) from error
        if self._asked_at is not None:
            self._tell()

    def close(self) -> None:
        """Stop listening: MPI must not end with an open request, and complains of messages that nobody received."""
        if self._listening != MPI.REQUEST_NULL and not self._listening.Test():
            self._listening.Cancel()
            self._listening.Wait()
        while self.comm.Iprobe(source=MPI.ANY_SOURCE):  # Slurm signals every rank, and each has told all others
            self.comm.Recv(self._message, source=MPI.ANY_SOURCE)

    def _handle(self, number: int, _: object) -> None:
        """Handle a signal. Python runs this between two of its instructions, so never within a call of MPI."""
        now = time.monotonic()
        if self._asked_at is None:
            self._ask(tell=True)
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            end_now()

    def _ask(self, tell: bool) -> None:
        """Note the request, start the grace time, and tell the other ranks if they do not know yet."""
        self._asked_at = time.monotonic()
        if tell:
            self._tell()
        if self.grace_seconds is not None:
            timer = threading.Timer(self.grace_seconds, end_now)
            timer.daemon = True
            timer.start()

    def _tell(self) -> None:
        """Send the request to all other ranks."""
        others = (rank for rank in range(self.comm.size) if rank != self.comm.rank)
        try:
            self._sent = [self.comm.Isend(self._message, dest=rank) for rank in others]
        except MPI.Exception as error:
            if error.Get_error_class() not in DEATHS:
                raise
