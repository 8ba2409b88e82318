"""How the C library hands out memory in a training process, and how much of it a process has held."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt
HELD_BYTES = 2**31 - 1  # the largest value an int takes
TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have glibc keep large freed buffers for the next step instead of asking the kernel for fresh, zeroed pages.

    A training step frees and asks for the same buffers over and over; page faults on them can take as long as the
    products that fill them. The process keeps its peak size. Call it before the first large allocation.

    Returns:
        Whether the C library is one that can be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: HELD_BYTES, M_TOP_PAD: TOP_PAD_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def release_freed_memory() -> None:
    """Give back to the system what lies freed, such as the leftovers of loading a model."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_bytes(device: "torch.device") -> int:
    """The most that this process has held at a time: of an accelerator's memory for tensors, else resident."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes


def room_bytes(device: "torch.device", ranks: int) -> int:
    """What each of some ranks might take beyond its peak: of its own accelerator, or of the host that they share."""
    if device.type == "cpu":
        return host_room_bytes() // ranks
    import torch

    free, _ = torch.cuda.mem_get_info(device)  # of all processes, and without what the context takes
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def host_room_bytes(root: Path = Path("/")) -> int:
    """Free memory of the host, or what the limit of a cgroup leaves if that is less, as in Slurm's jobs and containers.

    Args:
        root: of the file system.
    """
    room = psutil.virtual_memory().available
    for folder, limit, used, cache in _cgroups(root):
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        room = min(room, most - now + int(stat.get(cache, 0)))  # pages of files that were read go when room is needed
    return max(room, 0)


def _cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's cgroup and those above it, with the names of their limit, use, and cache of files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":  # version 1
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / own.lstrip("/")
        yield from ((above, *names) for above in (folder, *folder.parents) if above.is_relative_to(top))
