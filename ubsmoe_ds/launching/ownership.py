"""Hold a run's folder for the life of one job: two jobs that write to one folder would leave a mixture of both.

A lock on a file in the folder (flock) says who holds it. The system gives it up when the process ends, however that
happens, so a job that was killed never keeps a later one out. Between hosts it holds where the file system's locks do:
NFS, GPFS, CephFS, Lustre mounted with `flock`.
"""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.terminal import say

FILE = ".owner"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
WAIT_SECONDS = 2.0  # for another process that only looks whether the folder is held
LOOK_SECONDS = 0.1


def claim(folder: Path, run_id: str, wait_s: float = WAIT_SECONDS) -> IO[str]:
    """Take the folder, which must exist; it is held until the file that is returned is closed, or the process ends.

    Args:
        folder: the run's.
        run_id: written into the file for others to read.
        wait_s: how long to wait for another process to give it up.

    Raises:
        UserError: if another process holds the folder.
        OSError: if the file cannot be written.
    """
    file = os.fdopen(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    deadline = time.monotonic() + wait_s
    while not _lock(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            holder = _describe(file)
            file.close()
            raise held(folder, holder)
        time.sleep(LOOK_SECONDS)
    file.truncate(0)
    owner = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%FT%T%z")}
    file.write(json.dumps(owner) + "\n")
    file.flush()
    return file


def holder_of(folder: Path) -> str:
    """Return which process holds the folder, in words; empty if none does."""
    try:
        with (folder / FILE).open(encoding="utf-8") as file:
            return "" if _lock(file, fcntl.LOCK_SH, quiet=True) else _describe(file)
    except (FileNotFoundError, NotADirectoryError):
        return ""


def held(folder: Path, holder: str) -> UserError:
    """Return the error about a folder that is held."""
    return UserError(f"output: {folder} is in use by {holder}; wait until it ends, or set name=... or output=...")


def _lock(file: IO[str], kind: int, quiet: bool = False) -> bool:
    """Lock the file until it is closed; return False if another process has it.

    A file system without locks is told to the user, who then has to see to it himself.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not quiet:
            line = (
                f"warning: {file.name} cannot be locked ({error.strerror}); see to it that no other job uses its folder"
            )
            say(line, error=True)
    return True


def _describe(file: IO[str]) -> str:
    """Return what a file says of its owner."""
    file.seek(0)
    try:
        owner = json.loads(file.read(2000))
        return f"run {owner['run_id']} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another job"
