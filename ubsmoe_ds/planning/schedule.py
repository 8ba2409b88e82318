"""Assign the clients of a cohort to groups, longest first. Pure functions, the same on all ranks."""

from collections.abc import Mapping, Sequence


def assign(cost_CG: Mapping[int, Mapping[int, float]], groups: int) -> list[list[int]]:
    """Return for each group the clients that it trains, in order.

    The client that costs most comes first, and goes where it is done soonest (LPT: Graham 1969; with equal groups the
    longest one takes at most 4/3 - 1/(3 groups) times the best possible). Ties go to the client and the group of the
    lower number, so that all ranks agree.

    Args:
        cost_CG: seconds, or any unit, that each client takes on each group that may train it.
        groups: number of groups.
    """
    busy = [0.0] * groups
    turns: list[list[int]] = [[] for _ in range(groups)]
    for client in sorted(cost_CG, key=lambda c: (-min(cost_CG[c].values()), c)):
        group = min(cost_CG[client], key=lambda g: (busy[g] + cost_CG[client][g], g))
        busy[group] += cost_CG[client][group]
        turns[group].append(client)
    return turns


def loads(cost_CG: Mapping[int, Mapping[int, float]], turns: Sequence[Sequence[int]]) -> list[float]:
    """Return how long each group is busy."""
    return [sum(cost_CG[client][group] for client in clients) for group, clients in enumerate(turns)]


def lower_bound(cost_CG: Mapping[int, Mapping[int, float]], groups: int) -> float:
    """Return what no schedule can beat: the mean load at everybody's cheapest, and the longest single client."""
    cheapest = [min(costs.values()) for costs in cost_CG.values()]
    return max(sum(cheapest) / groups, max(cheapest, default=0.0))
