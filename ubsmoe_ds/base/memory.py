"""How the C library hands out memory in a training process, and how much of it a process has held."""

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

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
