"""Copy a flat tensor between the host and an accelerator at once; on the CPU nothing is copied.

Host memory comes from torch's cache of pinned blocks: a pageable copy would pass through a small buffer of the driver,
and a copy a parameter would wait for the device each time.
"""

import torch
from torch import Tensor


def to_host(flat: Tensor) -> Tensor:
    """Return the values on the CPU: the tensor itself if it is there, else a pinned copy, after one wait."""
    if flat.device.type == "cpu":
        return flat
    return torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat)


def to_device(flat: Tensor, device: torch.device) -> Tensor:
    """Return host values on a device: the tensor itself for the CPU, else a copy that the host does not wait for."""
    if device.type == "cpu":
        return flat
    return flat.pin_memory().to(device, non_blocking=True)
