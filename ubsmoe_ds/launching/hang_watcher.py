"""Watch one rank from a process of its own, and end it if it hangs: a stopped process can do nothing about itself.

    python -I -S hang_watcher.py RECORD STACKS TIMEOUT SURVIVES DESCRIPTION

`HangWatch` (hang_watch.py) starts it in a rank. RECORD and STACKS are descriptors of memory that both share: in the
first the rank notes its progress, into the second it writes the stacks of its threads on the signal `ASK`. The watcher
ends when its standard input does, which the rank holds open for as long as it lives. The watcher of the job's first
rank reads there, in one line, which other ranks the host has; if all wait, for one another, it ends its own.

It imports little but the standard library and takes some 20 ms to start; then it sleeps nearly always.
"""

import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ubsmoe_ds.base.errors import EXIT_FAILURE  # noqa: E402
from ubsmoe_ds.launching.progress_record import (  # noqa: E402
    FLAG,
    OTHERS_WAIT_AT,
    PROGRESS,
    RECORD_BYTES,
    STAGE_END,
    WAITS_AT,
    Peer,
    do_all_wait,
    open_peers,
    stage_of,
)
from ubsmoe_ds.launching.sign_in import sign_off  # noqa: E402

ASK = signal.SIGRTMAX - 2  # free: SIGUSR1 asks to stop, SIGUSR2 is some sites' own, and shells use neither end
LOOKS, LONGEST_INTERVAL = 10, 5.0  # looks within the timeout; seconds between two at most
WORKING = 0.002  # of a core; a rank that waits by polling (mpi/collectives.py) uses ten times as much, an idle one less
MOVED_BYTES = 2**20  # read or written: it works
ANSWER_SECONDS = 3.0  # for the rank to write its stacks; one in the kernel cannot
SAY_SECONDS = 5.0  # for the message to be taken
MESSAGE_SECONDS = 0.3  # for mpiexec to forward the message before it ends the job
OVERDUE, WORKS = "overdue", "works"  # what a rank is that has noted nothing for the timeout
ALL_WAIT_TIMES = 2  # looks, a timeout apart, at which all ranks wait; a rank may have been about to go on
STATES = {"T": "stopped by a signal", "D": "in an uninterruptible system call, as of a file system that is stuck"}
# the innermost call of a thread that waits for other ranks: the job's, or those of its own client
WAITS = re.compile(r'  File ".*/(ubsmoe_ds/mpi/(collectives|exits|ulfm)\.py|torch/distributed/.*|deepspeed/comm/.*)"')


class Look(NamedTuple):
    """Hold what a look at the rank shows."""

    events: int  # that the rank has noted; none are taken back
    counted: bool  # whether the stage consists of steps that are noted one by one
    state: str  # of the process, a letter of /proc/PID/stat: T stopped, t traced, D uninterruptible, S asleep, R runs
    cpu_seconds: float  # that it has used
    moved_bytes: int  # that it has read and written


class Rule:
    """Decides from one look after the other whether a rank shows no sign of life.

    Within a counted stage each step must end within the timeout. Other stages may take any time as long as the rank
    works: it uses the CPU, reads or writes. A rank that is stopped must be so for the whole timeout.

    Args:
        timeout: seconds.
        interval: seconds between two looks. More count as two intervals: a watcher that was suspended, as the whole
            host or job may be, has seen nothing in between.
        look: the first.
    """

    def __init__(self, timeout: float, interval: float, look: Look) -> None:
        self.timeout, self.interval = timeout, interval
        self.silent = self.stopped = 0.0  # seconds
        self._first = look  # of the silence

    def judge(self, passed: float, look: Look) -> str | None:
        """Return OVERDUE for a rank that has shown no sign of life for the timeout, WORKS for one that only works.

        Args:
            passed: seconds since the look before.
            look: what it shows now.
        """
        passed = min(passed, 2 * self.interval)
        self.stopped = self.stopped + passed if look.state == "T" else 0.0
        self.silent += passed
        if look.events != self._first.events or look.state == "t":  # a debugger holds it
            self.start_anew(look)
        if look.state == "T":
            return OVERDUE if self.stopped > self.timeout else None
        if self.silent <= self.timeout:
            return None
        return WORKS if not look.counted and self._works(look) else OVERDUE

    def start_anew(self, look: Look) -> None:
        """Begin the silence now: the rank is alive."""
        self.silent, self._first = 0.0, look

    def _works(self, look: Look) -> bool:
        used, moved = look.cpu_seconds - self._first.cpu_seconds, look.moved_bytes - self._first.moved_bytes
        return used >= WORKING * self.silent or moved >= MOVED_BYTES


def is_waiting(stacks: str) -> bool:
    """Return whether a thread waits for other ranks, by the stacks of faulthandler (innermost call first)."""
    lines = stacks.splitlines()
    return any(WAITS.match(line) for before, line in zip(lines, lines[1:], strict=False) if before.endswith("first):"))


def look_at(pid: int, record: bytes) -> Look:
    """Return what shows of a process; raise OSError if it is gone."""
    events, _, counted = PROGRESS.unpack_from(record)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return Look(events, bool(counted), fields[0], ticks / os.sysconf("SC_CLK_TCK"), _moved(pid))


def _moved(pid: int) -> int:
    """Return the bytes that a process has read and written, pages of mapped files among them; 0 where nobody counts."""
    try:
        entries = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(entries[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def message(description: str, stage: str, silent: float, timeout: float, pid: int, state: str) -> str:
    """Return what names a rank that hangs, without what follows from it."""
    return (
        f"error: {description} hangs: no progress for {silent:.1f} s in {stage} (hang_timeout_s {timeout:g}); "
        f"{process_message(pid, state)}"
    )


def process_message(pid: int, state: str) -> str:
    """Return where a process is, on which host, and what it does."""
    what = f"is {STATES[state]} (state {state})" if state in STATES else f"lives (state {state})"
    return f"process {pid} on {os.uname().nodename} {what}{_kernel_place(pid)}"


def all_wait_message(peers: Sequence[tuple[Peer, int]], hosts: int, silent: float, timeout: float) -> str:
    """Return what says that all ranks wait, and where those of this host do."""
    where = "; ".join(f"{peer.description} in {stage_of(os.pread(record, RECORD_BYTES, 0))}" for peer, record in peers)
    here = "" if hosts == 1 else f"{hosts} hosts, here "
    return (
        f"error: all ranks wait for one another: no progress for {silent:.1f} s (hang_timeout_s {timeout:g}); "
        f"{here}{where}"
    )


def _kernel_place(pid: int) -> str:
    """Return in which function of the kernel a process waits, and in which system call; empty where that is secret."""
    found = []
    for name in ("wchan", "syscall"):
        try:
            word = Path(f"/proc/{pid}/{name}").read_text().split()[:1]
        except OSError:
            continue
        found += [f"{name} {text}" for text in word if text not in ("0", "-1", "running")]
    return f", {', '.join(found)}" if found else ""


def end(pid: int, text: str, *, ends_job: bool) -> None:
    """Say why a rank is ended, and end it.

    Args:
        pid: the rank, which is the parent of this process.
        text: what is said.
        ends_job: whether the job ends with it, of which the process that runs mpiexec is told, if there is one.
    """
    # in a thread: whoever reads the output may hang too
    say = threading.Thread(target=os.write, args=[sys.stderr.fileno(), text.encode()], daemon=True)
    say.start()
    say.join(SAY_SECONDS)
    if ends_job:
        sign_off(os.environ, EXIT_FAILURE)
    time.sleep(MESSAGE_SECONDS)
    if os.getppid() == pid:  # not an heir of its number
        os.kill(pid, signal.SIGKILL)  # its launcher ends the others, or ULFM goes on without it


class Watcher:
    """Watches a rank until it ends.

    Args:
        pid: the rank, which is the parent of this process.
        record, stacks: descriptors, see above.
        timeout: seconds.
        survives: whether the job goes on when ranks die.
        description: of the rank.
    """

    def __init__(self, pid: int, record: int, stacks: int, timeout: float, survives: bool, description: str) -> None:
        self.pid, self.stacks, self.survives, self.description = pid, stacks, survives, description
        self.record = record
        self.hosts = self.all_waited = 0  # of the job; times in a row that all its ranks were found waiting
        self.peers: list[tuple[Peer, int]] = []  # ranks of this host
        self.rule = Rule(timeout, min(timeout / LOOKS, LONGEST_INTERVAL), look_at(pid, self._read()))

    def watch(self) -> None:
        """Look again and again until the rank has ended or was ended; raise OSError if it is gone."""
        looked_at = time.monotonic()
        while not self._has_left(self.rule.interval):
            record = self._read()
            look = look_at(self.pid, record)
            now = time.monotonic()
            verdict = self.rule.judge(now - looked_at, look)
            looked_at = now
            if verdict is not None and self._hangs(verdict, look, record):
                return

    def _read(self) -> bytes:
        """Return what the rank has noted."""
        return os.pread(self.record, STAGE_END, 0)

    def _has_left(self, seconds: float) -> bool:
        """Wait for so long; return at once with True when the rank closes our standard input."""
        if not select.select([0], [], [], seconds)[0]:
            return False
        line = sys.stdin.readline()
        if line:  # once: which ranks this host has
            self.hosts, *peers = json.loads(line)
            with suppress(OSError):  # one of them has ended
                self.peers = open_peers(peers)
        return not line

    def _hangs(self, verdict: str, look: Look, record: bytes) -> bool:
        """End a rank that is overdue, or one of many that all wait; return whether it has ended or was ended."""
        stacks = "" if look.state == "T" else self._ask()
        if self._has_left(0):
            return True
        waits = is_waiting(stacks)  # then another rank hangs, if any: that one has a watcher too
        self._note_waiting(1 + look.events if waits else 0)
        self.all_waited = self.all_waited + 1 if waits and self._do_all_wait() else 0
        if self.all_waited == ALL_WAIT_TIMES:
            line = all_wait_message(self.peers, self.hosts, self.all_waited * self.rule.timeout, self.rule.timeout)
        elif waits or verdict == WORKS or self._read() != record:
            self.rule.start_anew(look)
            return False
        else:
            silent = max(self.rule.silent, self.rule.stopped)
            line = message(self.description, stage_of(record), silent, self.rule.timeout, self.pid, look.state)
        self._end(line, stacks)
        return True

    def _note_waiting(self, waiting: int) -> None:
        os.pwrite(self.record, FLAG.pack(waiting), WAITS_AT)

    def _do_all_wait(self) -> bool:
        """Return whether all ranks of the job are known to wait."""
        others = FLAG.unpack(os.pread(self.record, FLAG.size, OTHERS_WAIT_AT)) == (1,)
        return do_all_wait(self.peers) and (self.hosts == 1 or others)

    def _end(self, line: str, stacks: str) -> None:
        """Say why the rank is ended, and end it."""
        kind = "group" if self.description.startswith("group ") else "client"
        follows = f"its {kind} is given up" if self.survives else "continue with --resume auto"
        end(self.pid, f"{line}; {follows}\n{stacks}", ends_job=not self.survives)

    def _ask(self) -> str:
        """Return the stacks of the rank's threads; empty if it does not answer."""
        start = os.fstat(self.stacks).st_size
        os.kill(self.pid, ASK)
        deadline = time.monotonic() + ANSWER_SECONDS
        size = start
        while time.monotonic() < deadline and not self._has_left(ANSWER_SECONDS / 20):
            before, size = size, os.fstat(self.stacks).st_size
            if size == before > start:  # whole
                break
        return os.pread(self.stacks, size - start, start).decode(errors="replace")


def main() -> None:
    """Watch the process that has started this one."""
    record, stacks, timeout, survives, description = sys.argv[1:]
    with suppress(OSError):  # the rank is gone
        Watcher(os.getppid(), int(record), int(stacks), float(timeout), survives == "1", description).watch()


if __name__ == "__main__":
    main()
