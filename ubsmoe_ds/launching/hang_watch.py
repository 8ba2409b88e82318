"""Note this rank's progress where a watcher sees it (hang_watcher.py), which ends the rank if it hangs.

Each rank has a watcher: a process of its own, on its host, and so whatever started the job and whichever ranks are
stopped. The watcher of a rank that waits for another leaves it alone; that other one's has to act. If all ranks wait,
for one another, the watcher of the job's first rank does, which reads what the others note. Until ranks have met, when
one that hangs may have no watcher yet, all ranks have other ones, which do not let them wait for ever
(start_watcher.py).
"""

import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.launching.hang_watcher import ASK
from ubsmoe_ds.launching.launchers import is_first, started_as
from ubsmoe_ds.launching.progress_record import (
    FLAG,
    OTHERS_WAIT_AT,
    PROGRESS,
    RECORD_BYTES,
    STAGE_BYTES,
    STAGE_END,
    Peer,
    do_all_wait,
    open_peers,
)
from ubsmoe_ds.launching.start_watcher import LEAST_SECONDS

HANG_WATCHER, START_WATCHER = (Path(__file__).with_name(f"{name}_watcher.py") for name in ("hang", "start"))
# of a whole job, such as those of Slurm; the watcher has nothing to save, and ends with its rank
NOT_FOR_WATCHERS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class HangWatch:
    """Keeps this rank's progress, which is watched as long as this object lives.

    Args:
        description: of this rank, for messages.
        timeout_s: seconds without progress after which it is ended; None: nobody watches.
        survives: whether the job goes on when ranks die.
    """

    def __init__(self, description: str, timeout_s: float | None, survives: bool) -> None:
        self._events = self._number = 0
        self._watcher: subprocess.Popen | None = None
        self._peers: list[tuple[Peer, int]] = []
        descriptor = os.memfd_create("progress")  # stays open: the first rank's watcher opens it from here
        os.truncate(descriptor, RECORD_BYTES)
        self._record = mmap.mmap(descriptor, RECORD_BYTES)
        self.enter("start-up")
        if timeout_s is not None:
            stacks = os.memfd_create("stacks")
            faulthandler.register(ASK, file=stacks)
            arguments = [str(descriptor), str(stacks), f"{timeout_s:g}", str(int(survives)), description]
            self._watcher = _start(HANG_WATCHER, arguments, [descriptor, stacks])
        self.peer = Peer(os.getpid(), descriptor, description)

    def enter(self, stage: str, counted_from: int | None = None) -> None:
        """Begin a stage.

        Args:
            stage: its name in messages.
            counted_from: number of steps that are done, if each further one is counted; then none may take longer than
                the timeout. None: the stage may take any time, as long as the process works.
        """
        name = stage.encode()[: STAGE_BYTES - 1].ljust(STAGE_BYTES, b"\0")
        self._record[PROGRESS.size : STAGE_END] = name
        self._counted, self._number = counted_from is not None, counted_from or 0
        self._note()

    def count(self) -> None:
        """Note that the next step begins; costs a microsecond."""
        self._number += 1
        self._note()

    def meet(self, peers: Sequence[Peer], acts: bool, hosts: int) -> None:
        """Learn of all ranks of this host; called on the first of them.

        Args:
            peers: `peer` of every rank of the host.
            acts: whether this rank's watcher ends it when all ranks of the job wait; the job's first.
            hosts: number of the job's hosts.
        """
        with suppress(OSError):  # a rank in a container of its own: nobody sees whether all wait
            self._peers = open_peers(peers)
            if acts and self._watcher is not None and self._watcher.stdin is not None:
                self._watcher.stdin.write(f"{json.dumps([hosts, *peers])}\n".encode())
                self._watcher.stdin.flush()

    def host_waits(self) -> bool:
        """Return whether all ranks of this host were found to wait for others."""
        return do_all_wait(self._peers)

    def note_others(self, wait: bool) -> None:
        """Note whether all ranks of all other hosts wait."""
        FLAG.pack_into(self._record, OTHERS_WAIT_AT, wait)

    def _note(self) -> None:
        self._events += 1
        PROGRESS.pack_into(self._record, 0, self._events, self._number, self._counted)


class StartWatch:
    """Has this rank ended unless it closes this in time: at the latest when a `HangWatch` watches it.

    Args:
        timeout_s: hang_timeout_s; None: nobody watches.
        environment: the rank's, from its process manager.
    """

    def __init__(self, timeout_s: float | None, environment: Mapping[str, str]) -> None:
        self._watcher: subprocess.Popen | None = None
        if timeout_s is not None:
            limit, first = max(timeout_s, LEAST_SECONDS), int(is_first(environment))
            arguments = [f"{limit:g}", str(first), f"rank {started_as(environment)}"]
            self._watcher = _start(START_WATCHER, arguments, [])

    def close(self) -> None:
        """End the watcher."""
        if self._watcher is not None:
            with self._watcher:
                self._watcher.kill()  # it may be stopped itself


def _start(watcher: Path, arguments: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen | None:
    """Start a watcher of this process; warn and return None if the system has no room for it.

    Args:
        watcher: the script.
        arguments: its arguments, of which the last describes this rank.
        descriptors: those that it inherits.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WATCHERS)  # a started process inherits it
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(watcher), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
    except OSError as error:
        why = f"{arguments[-1]} has no watcher ({error.strerror})"
        say(f"warning: hang_timeout_s: {why}; nobody will see if it hangs", error=True)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
