"""Watch one rank from a process of its own until it has met the others, and end it if that takes too long.

    python -I -S start_watcher.py LIMIT FIRST DESCRIPTION

Until ranks have met, one waits in MPI for another that hangs, and that one may have no watcher yet (hang_watcher.py).
`StartWatch` (hang_watch.py) starts this process in a rank, before MPI. It ends when its standard input does, which the
rank holds open.
"""

import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ubsmoe_ds.launching.hang_watcher import (  # noqa: E402
    LONGEST_INTERVAL,
    LOOKS,
    OVERDUE,
    STATES,
    Look,
    Rule,
    end,
    look_at,
    process_message,
)
from ubsmoe_ds.launching.progress_record import PROGRESS  # noqa: E402

LEAST_SECONDS = 300.0  # whatever hang_timeout_s is: ranks import everything in this time, some of them from a cold disk
FIRST_SECONDS, OTHERS_SECONDS = 1.0, 4.0  # that ranks which only wait have more, so that one line says what is known
ONE_STEP = PROGRESS.pack(0, 0, 1)  # the start as a rank would note it: one step, which must end in time


def has_met(seconds: float) -> bool:
    """Wait for so long; return at once with True when the rank has met the others, or has ended."""
    return bool(select.select([0], [], [], seconds)[0])


def watch(rank: int, limit: float) -> Look | None:
    """Return what shows of a rank when its time is over; None if it has met the others, or has ended."""
    look, looked_at = look_at(rank, ONE_STEP), time.monotonic()
    rule = Rule(limit, min(limit / LOOKS, LONGEST_INTERVAL), look)
    while not has_met(rule.interval):
        look, before, looked_at = look_at(rank, ONE_STEP), looked_at, time.monotonic()
        if rule.judge(looked_at - before, look) == OVERDUE:
            return look
    return None


def main() -> None:
    """Watch the process that has started this one."""
    limit, first, description = sys.argv[1:]
    rank = os.getppid()
    with suppress(OSError):  # the rank is gone
        look = watch(rank, float(limit))
        more = FIRST_SECONDS if first == "1" else OTHERS_SECONDS
        if look is None or (look.state not in STATES and has_met(more)):
            return
        why = "it hangs" if look.state in STATES else "it waits for ranks that hang or are not there"
        line = (
            f"error: {description} has not met the others in {limit} s (hang_timeout_s, at least {LEAST_SECONDS:g}): "
            f"{why}; {process_message(rank, look.state)}; start again with --resume auto\n"
        )
        end(rank, line, ends_job=True)


if __name__ == "__main__":
    main()
