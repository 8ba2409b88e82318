"""Files in a temporary folder, by which ranks and the process that runs mpiexec hear of each other.

A rank that can be asked to stop signs in with its process id. The rank that knows how the job ends signs off with the
exit code. No MPI here: the folder works before MPI starts and after it ends.
"""

import os
from collections.abc import Mapping
from pathlib import Path

PARENT_SPEAKS = "UBSMOE_DS_PARENT_SPEAKS"  # variable of ranks that `relaunch` has started: the folder
SUPERVISED_FROM = "supervised_from"  # file in the folder, which other hosts may see too: where mpiexec is run
ENDED = "ended"  # file in the folder: the exit code, once the ranks know it


def sign_in(environment: Mapping[str, str], description: str) -> None:
    """Tell who this rank is, and that it can be asked to stop from now on."""
    folder = environment.get(PARENT_SPEAKS, "")
    if folder and _is_beside(Path(folder)):
        _write_whole(Path(folder), str(os.getpid()), description)


def sign_off(environment: Mapping[str, str], code: int) -> None:
    """Tell that the job ends, with which code, and that the user has been told all there is to say."""
    folder = environment.get(PARENT_SPEAKS, "")
    if folder and Path(folder).is_dir():
        _write_whole(Path(folder), ENDED, str(code))


def read_code(folder: Path) -> int | None:
    """Return the exit code that a rank has signed off with; None before that."""
    ended = folder / ENDED
    return int(ended.read_text(encoding="utf-8")) if ended.exists() else None


def open_sign_in(folder: Path) -> None:
    """Let ranks of this host sign in; called by the process that runs mpiexec."""
    (folder / SUPERVISED_FROM).write_text(process_table(), encoding="utf-8")


def process_table() -> str:
    """Return what tells process ids of this host and container from those of others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


def _is_beside(folder: Path) -> bool:
    """Return whether the process that runs mpiexec is on this host and counts processes as this one does."""
    try:
        return (folder / SUPERVISED_FROM).read_text(encoding="utf-8") == process_table()
    except OSError:
        return False


def _write_whole(folder: Path, name: str, text: str) -> None:
    """Write a file that appears complete."""
    unfinished = folder / f".{os.getpid()}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(folder / name)
