"""Compare updates in size, so that one broken client does not spoil the merge.

A median of the other clients, not a mean, is the measure: up to nearly half of them may be broken themselves. [ours]
Shapes: C clients, D those that count.
"""

import numpy as np


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
    count = int(counted_C.sum())
    if count > 1:
        scaled_D = norm_C[counted_C] / work_C[counted_C]
        order_D = scaled_D.argsort(kind="stable")
        rising_D, place_D = scaled_D[order_D], order_D.argsort(kind="stable")
        # without one of them, those behind it move up by a place
        low_D, high_D = (rising_D[middle + (place_D <= middle)] for middle in ((count - 2) // 2, (count - 1) // 2))
        median_D = (low_D + high_D) / 2
        excess_C[counted_C] = np.divide(scaled_D, median_D, out=np.zeros(len(scaled_D)), where=median_D > 0)
    return excess_C
