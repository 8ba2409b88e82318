"""Find updates that are not finite, and compare them in size, so that one broken client does not spoil the merge.

A median of the other clients, not a mean, is the measure: up to nearly half of them may be broken themselves. [ours]
Shapes: C clients.
"""

import math

import numpy as np
import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or Inf. A sum with one is not finite; `isfinite` takes ten times as long as it."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())  # finite values can overflow


def excess(norm_C: np.ndarray, work_C: np.ndarray) -> np.ndarray:
    """Return how many times longer each client's update is than the others' median, [C].

    That is n_c / median of n_d over the other clients d, where n = norm / work: a client that did a part of the steps
    has moved less. Clients that sit the round out, and norms that are not finite, do not count. The ratio is 0 for them
    and where there is nothing to compare with.

    Args:
        norm_C: L2 norm of each client's update.
        work_C: part of the round's work that each client did, 0 to 1.
    """
    counted_C = (work_C > 0) & np.isfinite(norm_C)
    excess_C = np.zeros(len(norm_C))
    others = int(counted_C.sum()) - 1
    if others > 0:
        scaled_N = norm_C[counted_C] / work_C[counted_C]
        order_N = scaled_N.argsort(kind="stable")
        rising_N, place_N = scaled_N[order_N], order_N.argsort(kind="stable")
        # without one of them, those behind it move up by a place
        low_N, high_N = (rising_N[middle + (place_N <= middle)] for middle in ((others - 1) // 2, others // 2))
        median_N = (low_N + high_N) / 2
        excess_C[counted_C] = np.divide(scaled_N, median_N, out=np.zeros(len(scaled_N)), where=median_N > 0)
    return excess_C
