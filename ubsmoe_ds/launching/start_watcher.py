"""Watch one rank from a process of its own until it has met the others, and end it if that takes too long.

    python -I -S start_watcher.py LIMIT FIRST DESCRIPTION

Until ranks have met, one waits in MPI for another that hangs, and that one may have no watcher yet (hang_watcher.py).
`StartWatch` (hang_watch.py) starts this process in a rank, before MPI. It ends when its standard input does, which the
rank holds open.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ubsmoe_ds.base.errors import EXIT_FAILURE  # noqa: E402
from ubsmoe_ds.launching.sign_in import sign_off  # noqa: E402

LEAST_SECONDS = 300.0  # whatever hang_timeout_s is: ranks import everything in this time, some of them from a cold disk
FIRST_SECONDS, OTHERS_SECONDS = 1.0, 4.0  # that ranks which only wait have more, so that one line says what is known
MESSAGE_SECONDS = 0.3  # for mpiexec to forward the message before it ends the job


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; raise OSError if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def main() -> None:
    """Watch the process that has started this one."""
    limit, first, description = sys.argv[1:]
    rank = os.getppid()
    if select.select([0], [], [], float(limit))[0]:
        return
    stopped = is_stopped(rank)
    more = FIRST_SECONDS if first == "1" else OTHERS_SECONDS
    if not stopped and select.select([0], [], [], more)[0]:
        return
    why = "it is stopped by a signal (state T)" if stopped else "it waits for ranks that hang or are not there"
    line = (
        f"error: {description} has not met the others in {limit} s (hang_timeout_s, at least {LEAST_SECONDS:g}): {why}"
        f"; process {rank} on {os.uname().nodename}; start again with --resume auto\n"
    )
    os.write(sys.stderr.fileno(), line.encode())
    sign_off(os.environ, EXIT_FAILURE)
    time.sleep(MESSAGE_SECONDS)
    if os.getppid() == rank:  # not an heir of its number
        os.kill(rank, signal.SIGKILL)  # its launcher ends the others


if __name__ == "__main__":
    main()
