"""How much memory a process has held."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Return this process's peak in bytes: an accelerator's memory for tensors, on the CPU resident memory."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes
