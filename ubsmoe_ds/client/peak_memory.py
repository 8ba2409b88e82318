"""How much memory a process has held."""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """Return this process's peak in bytes: an accelerator's memory for tensors, on the CPU resident memory."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes


def room_bytes(device: torch.device, ranks: int) -> int:
    """What each of some ranks might take beyond its peak: of its own accelerator, or of the host that they share."""
    if device.type == "cpu":
        return host_room_bytes() // ranks
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
