"""Aggregation rules: pure functions on the stacked updates that the clients send for one unit.

Shapes: C clients, N elements of a unit. A rule knows nothing of ranks, files or MPI.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MergeRule = Callable[[Tensor, Tensor], Tensor]


def fedavg(update_CN: Tensor, weight_C: Tensor) -> Tensor:
    """Weighted mean of the clients' updates (FedAvg, arXiv 1602.05629; UB-SMoE's own rule).

    Args:
        update_CN: client updates, floating point.
        weight_C: non-negative data weights of any scale; only their ratios matter.

    Returns:
        The mean, [N], in the dtype of `update_CN`, summed in fp32 or wider.

    Raises:
        ValueError: if a weight is negative or not finite, or all are zero.
    """
    total = weight_C.sum()
    if not torch.isfinite(total) or (weight_C < 0).any() or total <= 0:
        raise ValueError(f"client weights must be finite, non-negative and not all zero, got {weight_C.tolist()}")
    wide = torch.promote_types(update_CN.dtype, torch.float32)
    share_C = (weight_C.double() / total.double()).to(wide)
    return (share_C @ update_CN.to(wide)).to(update_CN.dtype)
