"""Settings of the C library: keep freed memory for the next step, or return it to the system."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt
HELD_BYTES = 2**31 - 1  # the largest value an int takes
TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Make glibc keep large freed buffers for the next step instead of asking the kernel for fresh, zeroed pages.

    A training step frees and requests the same buffers over and over; page faults on them can take as long as the
    products that fill them. The process keeps its peak size. Call it before the first large allocation.

    Returns:
        Whether the C library accepted the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: HELD_BYTES, M_TOP_PAD: TOP_PAD_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def release_freed_memory() -> None:
    """Return freed memory to the system, such as the leftovers of loading a model."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
