"""Temporary folders of jobs, which nobody else may enter; what killed processes have left goes at a later start."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "ubsmoe_ds-"
SHARED_MEMORY = Path("/dev/shm")
OLD_SECONDS = 60  # of a name in it, after which nobody looks for it any more: MPI has long started
LOCK = "lock"  # held by the process that made the folder, and given up by the system when it ends


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for as long as the context lasts; first remove those that killed processes have left."""
    sweep()
    sweep_memory()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / f".{LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f".{LOCK}").rename(folder / LOCK)  # whoever finds it finds it held
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep() -> None:
    """Remove the folders of this user whose makers have ended; one without a lock is just being made."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # it is another user's, or another process sweeps as well
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid() and _take(descriptor):
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def sweep_memory() -> None:
    """Remove names of shared memory that MPICH has made in processes of this user which were killed while it started.

    Later there are no names: `join` removes them. A name ends with the process id, in hexadecimal, and a number.
    """
    for path in SHARED_MEMORY.glob("mpich_shm_*_*"):
        with contextlib.suppress(OSError, ValueError):  # another process sweeps as well, or it is no name of MPICH
            made, maker = path.lstat(), int(path.name.split("_")[2], 16)
            is_old = time.time() - made.st_mtime > OLD_SECONDS  # its maker may be in another container
            if made.st_uid == os.getuid() and is_old and not Path(f"/proc/{maker}").exists():
                path.unlink()


def _take(descriptor: int) -> bool:
    """Return whether nobody holds the lock; then this process does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
