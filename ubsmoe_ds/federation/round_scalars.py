"""Name the scalars of a merged round: a pure function of what all ranks have."""

import numpy as np

from ubsmoe_ds.federation.aggregator import Merged
from ubsmoe_ds.federation.metrics import (
    expert_scalars,
    merge_scalars,
    seconds_scalars,
    training_scalars,
    turn_seconds,
)
from ubsmoe_ds.federation.training import GroupTraining


def round_scalars(training: GroupTraining, merged: Merged) -> tuple[dict[str, float], dict[str, float]]:
    """Return (scalars by name, wall seconds by name).

    Args:
        training: any group's.
        merged: the merge.
    """
    exp, statistics, (seconds_G, bytes_G, _) = training.exp, merged.statistics, merged.sums
    names, stats_C = [exp.clients[client].name for client in statistics.cohort], statistics.stats_C
    group_C = statistics.place_C2[:, 0]
    sent_C = bytes_G[group_C] / np.bincount(group_C)[group_C]  # a group's turns travel together
    refused = [len(units) for units in merged.refused]
    metrics = training_scalars(names, stats_C, sent_C, statistics.usage.utilisation_LE, statistics.lora_ranks, refused)
    norms, rates = statistics.norm_C.tolist(), statistics.rate_C.tolist()
    weights = training.aggregator.server.weight_C.tolist()
    metrics |= expert_scalars(names, statistics.routed_CLE, statistics.squares_CLE2)
    metrics |= merge_scalars(names, stats_C, training.rows.kept, weights, norms, rates)
    local_C = statistics.seconds_C.tolist()
    if not exp.takes_turns:
        seconds_C = [seconds_G[group]._replace(local=local) for group, local in zip(group_C, local_C, strict=True)]
        return metrics, seconds_scalars(names, stats_C, seconds_C)
    roster, number = training.roster, training.progress.round
    for name, (group, turn) in zip(names, statistics.place_C2.tolist(), strict=True):
        metrics |= {f"group/{name}": roster.numbers[group], f"turn/{name}": turn}
    metrics["clients/cohort"] = len(names)
    if training.finished is not None:
        metrics["clients/drawn"] = len(roster.cohort(number))
    if roster.out(number):  # only after a death
        metrics["clients/out"] = len(roster.out(number))
    metrics["schedule/idle_share"], metrics["schedule/over_bound"] = roster.idle(number)
    groups = [trainer.name for trainer in exp.trainers]
    return metrics, turn_seconds(names, stats_C, local_C, groups, seconds_G)
