"""Run mpiexec and speak for its ranks where they cannot: when they are interrupted, asked to stop, or killed."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ubsmoe_ds.base.errors import DELIBERATE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_TERMINATED
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.launching.scratch import scratch_folder
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS, open_sign_in, read_code

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # ask a job to stop
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LOOK_SECONDS = 0.1  # between looks for ranks that have signed in
LEAVE_SECONDS = 5.0  # for ranks to end after their mpiexec
KILLED_SECONDS = 10.0  # for ranks to end that were killed; one in a system call of a stuck file system does not
OWN_CODES = (*DELIBERATE, EXIT_INTERRUPTED, EXIT_TERMINATED)  # with which ranks end, too, that say nothing any more
FAILED_SECONDS = 15.0  # for mpiexec to end after its ranks have failed; it may wait for a host that is cut off


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the system send this process the signal when the process that started it ends.

    In mpiexec, before it starts: SIGTERM asks the ranks to stop, if the process that supervises it is killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Supervisor:
    """Runs one mpiexec after the other, and supervises each until it ends.

    mpiexec gets a session of its own: a signal to the process group of this process must not reach it by itself,
    because it would end the ranks before they have saved.
    """

    def __init__(self) -> None:
        self.interrupted = self.asked_to_stop = False
        self.process: subprocess.Popen | None = None
        self.ranks: dict[int, str] = {}  # pidfd -> description of the rank
        self.seen = False  # whether any rank has signed in; where all are on other hosts none does
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, self._handle)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a job; return its exit code.

        Args:
            command: starts mpiexec.
            environment: of mpiexec; its ranks also get the folder where they sign in.
        """
        if self.asked_to_stop or self.interrupted:  # between two attempts
            return EXIT_INTERRUPTED if self.interrupted else EXIT_TERMINATED
        self.seen = False
        with scratch_folder() as folder:
            open_sign_in(folder)
            environment = {**environment, PARENT_SPEAKS: str(folder)}
            self.process = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=end_with_parent
            )
            dead = self._wait(self.process, folder)
            code = self.process.wait()
            dead = dead or self._look(folder)  # mpiexec may have been quicker
            self._end_what_is_left(folder)
            return self._judge(code, read_code(folder), dead)

    def _judge(self, code: int, signed_off: int | None, dead: Sequence[str]) -> int:
        """Return the job's exit code, and say who was killed if no rank has said how the job ends.

        Args:
            code: mpiexec's.
            signed_off: that of the rank that signed off, if one did.
            dead: descriptions of the ranks that were gone before mpiexec.
        """
        if signed_off is not None:
            if code not in (0, signed_off) and signed_off != EXIT_FAILURE:
                say(f"note: mpiexec ended with code {code} after the ranks had ended with {signed_off}", error=True)
            code = signed_off  # an mpiexec that had to be killed, or lost its proxy or a host, ends with any code
        elif not self.interrupted:
            if code < 0 and not self.asked_to_stop:
                say(f"error: mpiexec was killed (signal {-code}); continue with --resume auto", error=True)
            elif dead:
                say(f"error: {' or '.join(dead)} was killed", error=True)
            elif code not in OWN_CODES and not self.asked_to_stop:
                say(f"error: mpiexec ended with code {code}, and no rank has said why; see above", error=True)
            if code >= 0 and (dead or code not in OWN_CODES):  # mpiexec's is the number of the signal: 2 has a meaning
                code = EXIT_FAILURE
            if self.seen:  # an MPI that survives deaths calls it success if all have died
                code = code or EXIT_FAILURE
        if self.interrupted:
            return EXIT_INTERRUPTED
        if self.asked_to_stop and code not in DELIBERATE:
            return EXIT_TERMINATED
        return code if code >= 0 else 128 - code

    def _wait(self, process: subprocess.Popen, folder: Path) -> list[str]:
        """Wait until mpiexec ends; return the descriptions of the ranks that were gone before it."""
        dead: list[str] = []
        failed_at = float("inf")
        while process.poll() is None:
            gone = self._look(folder)
            dead = dead or gone  # the first, or the first few: mpiexec ends the others in milliseconds
            if read_code(folder) == EXIT_FAILURE:
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() > failed_at + FAILED_SECONDS:
                process.kill()
        return dead

    def _look(self, folder: Path) -> list[str]:
        """Look at the ranks that have signed in for a moment; return the descriptions of those that are gone."""
        for entry in folder.glob("[0-9]*"):
            description, self.seen = entry.read_text(encoding="utf-8"), True
            entry.unlink()
            try:
                self.ranks[os.pidfd_open(int(entry.name))] = description
            except ProcessLookupError:
                return [description]
        poll = select.poll()
        for handle in self.ranks:
            poll.register(handle, select.POLLIN)
        gone = [handle for handle, _ in poll.poll(LOOK_SECONDS * 1000)]
        for handle in gone:
            os.close(handle)
        return [self.ranks.pop(handle) for handle in gone]

    def _end_what_is_left(self, folder: Path) -> None:
        """End ranks that outlive mpiexec: they would write where the next attempt does."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.ranks and time.monotonic() < deadline + KILLED_SECONDS:
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            self._look(folder)
        for handle, description in self.ranks.items():
            say(
                f"warning: {description} was killed, but has not ended: the system holds it, perhaps in a stuck file "
                "system; it will do nothing more",
                error=True,
            )
            os.close(handle)
        self.ranks.clear()

    def _send(self, number: int) -> None:
        """Send a signal to every rank that has signed in."""
        for handle in list(self.ranks):
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(handle, number)

    def _handle(self, number: int, _: object) -> None:
        """Pass a signal to this process on to the ranks, or before they have signed in to mpiexec."""
        if number == signal.SIGINT:
            if not self.interrupted:
                os.write(sys.stderr.fileno(), b"error: interrupted\n")
            self.interrupted = True
        else:
            self.asked_to_stop = True
        if number != signal.SIGINT and self.ranks:
            self._send(signal.SIGUSR1)
            self._send(signal.SIGCONT)  # one that is stopped would not hear of it, and the others wait for it
        elif self.process is not None:  # with nothing to save yet
            self.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
