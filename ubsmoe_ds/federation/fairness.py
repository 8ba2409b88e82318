"""Measure how evenly a model serves clients, by their losses on evaluation rows of their own. Pure functions.

The worst tenth and the variance over clients are the measures of q-FFL (Li et al., arXiv 1905.10497), which
takes them of accuracies. Losses are used here, as rows may have no accuracy [ours]. Every client counts alike.
"""

import math
from collections.abc import Sequence

WORST_PART = 10  # one of so many clients


def worst_tenth(losses: Sequence[float]) -> float:
    """Return the mean of the ceil(C / 10) largest of C losses, at least one."""
    count = -(-len(losses) // WORST_PART)
    return math.fsum(sorted(losses)[-count:]) / count


def variance(losses: Sequence[float]) -> float:
    """Return the population variance, sum (loss - mean)^2 / C: the clients are all there are, not a sample."""
    mean = math.fsum(losses) / len(losses)
    return math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)


def fairness_scalars(losses: Sequence[float]) -> dict[str, float]:
    """Return the scalars of the clients with evaluation rows of their own; none if there are fewer than two."""
    if len(losses) < 2:
        return {}
    return {"fairness/worst_tenth": worst_tenth(losses), "fairness/variance": variance(losses)}
