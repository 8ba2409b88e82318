"""Find clients whose update is out of proportion to the cohort's, so that one broken client does not spoil the merge.

A median of the other clients, not a mean, is the measure: up to nearly half of them may be broken themselves. [ours]
Shapes: C clients.
"""

import numpy as np


def outliers(norm_C: np.ndarray, work_C: np.ndarray, factor: float | None) -> np.ndarray:
    """Return which clients to leave out of the round, [C] bool.

    Client c is left out if n_c > factor * median of n_d over the other clients d, where n = norm / work: a client that
    did a part of the steps has moved less. Clients that sit the round out, and norms that are not finite, do not count.

    Args:
        norm_C: L2 norm of each client's update.
        work_C: part of the round's work that each client did, 0 to 1.
        factor: `merge.screen_factor`; None: leave nobody out.
    """
    counted_C = (work_C > 0) & np.isfinite(norm_C)
    left_out_C = np.zeros(len(norm_C), dtype=bool)
    if factor is None:
        return left_out_C
    scaled_C = np.divide(norm_C, work_C, out=np.zeros(len(norm_C)), where=counted_C)
    for client in np.flatnonzero(counted_C):
        others = np.delete(scaled_C, client)[np.delete(counted_C, client)]
        median = np.median(others) if len(others) else 0.0
        left_out_C[client] = median > 0 and scaled_C[client] > factor * median
    return left_out_C
