"""Find updates that are not finite, and compare them in size, so that one broken client does not spoil the merge.

A median of the other clients, not a mean, is the measure: up to nearly half of them may be broken themselves. [ours]
Shapes: C clients.
"""

import numpy as np
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or Inf: 0 times it is NaN. `isfinite` takes ten times as long on the CPU."""
    return float((values * 0).sum()) == 0


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
    scaled_C = np.divide(norm_C, work_C, out=np.zeros(len(norm_C)), where=counted_C)
    excess_C = np.zeros(len(norm_C))
    for client in np.flatnonzero(counted_C):
        others = np.delete(scaled_C, client)[np.delete(counted_C, client)]
        median = np.median(others) if len(others) else 0.0
        excess_C[client] = scaled_C[client] / median if median > 0 else 0.0
    return excess_C
