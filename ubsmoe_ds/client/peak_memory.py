"""Measure how much memory a process has held at most."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Return this process's peak in bytes: tensors on an accelerator, resident memory on the CPU."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes
