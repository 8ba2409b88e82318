"""Sum what all ranks know of a round's turns, and name the scalars; all ranks get the same.

Shapes: C clients of the round, G groups, L layers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.client.engine import LocalStats
from ubsmoe_ds.federation.aggregator import Merged
from ubsmoe_ds.federation.metrics import (
    RoundSeconds,
    expert_scalars,
    merge_scalars,
    seconds_scalars,
    training_scalars,
    turn_seconds,
)
from ubsmoe_ds.federation.training import GroupTraining


class RoundScalars(NamedTuple):
    """Hold the figures of a round that are recorded.

    stats: sums of the local steps of each client of the round. metrics: scalars by name. seconds: wall times.
    steps_taken, scales: see `Progress`, of the clients of the round, where clients take turns. local_C: seconds of the
    local steps of each.
    """

    stats: list[LocalStats]
    metrics: dict[str, float]
    seconds: dict[str, float]
    steps_taken: dict[int, int]
    scales: dict[int, Tensor]
    local_C: list[float]


def round_scalars(training: GroupTraining, merged: Merged) -> RoundScalars:
    """Return the scalars of a merged round (a collective).

    Args:
        training: this rank's group; its turns, and its stopwatch with the stages up to the merge.
        merged: the merge.
    """
    exp, statistics, aggregator = training.exp, merged.statistics, training.aggregator
    stats_C, own_C, seconds_G = _tables(training, statistics.cohort)
    seconds_C, sent_C, rate_C = [RoundSeconds(*row) for row in own_C[:, :4]], own_C[:, 4], own_C[:, 5]
    names = [exp.clients[client].name for client in statistics.cohort]
    refused = [len(units) for units in merged.refused]
    metrics = training_scalars(names, stats_C, sent_C, statistics.usage.utilisation_LE, statistics.lora_ranks, refused)
    weights, norms, rates = (part.tolist() for part in (aggregator.server.weight_C, statistics.norm_C, rate_C))
    metrics |= expert_scalars(names, statistics.routed_CLE, statistics.squares_CLE2)
    metrics |= merge_scalars(names, stats_C, training.rows.kept, weights, norms, rates)
    if not exp.takes_turns:
        return RoundScalars(stats_C, metrics, seconds_scalars(names, stats_C, seconds_C), {}, {}, [])
    groups = [trainer.name for trainer in exp.trainers]
    roster = training.roster
    numbers = roster.numbers
    for name, (group, turn) in zip(names, statistics.place_C2.tolist(), strict=True):
        metrics |= {f"group/{name}": numbers[group], f"turn/{name}": turn}
    metrics["clients/cohort"] = len(names)
    if training.finished is not None:
        metrics["clients/drawn"] = len(roster.cohort(training.progress.round))
    if roster.out(training.progress.round):  # only after a death
        metrics["clients/out"] = len(roster.out(training.progress.round))
    metrics["schedule/idle_share"], metrics["schedule/over_bound"] = roster.idle(training.progress.round)
    local_C = [seconds.local for seconds in seconds_C]
    seconds = turn_seconds(names, stats_C, local_C, groups, seconds_G)
    taken = dict(zip(statistics.cohort, own_C[:, 6].astype(int).tolist(), strict=True))
    scales: dict[int, Tensor] = {}
    if exp.router.gate_rescale == "learned":
        scales_CL = torch.from_numpy(own_C[:, 7:]).float()
        scales_CL = torch.where(torch.isfinite(scales_CL), scales_CL, 1.0)  # of a client whose steps went wrong
        scales = dict(zip(statistics.cohort, scales_CL, strict=True))
    return RoundScalars(stats_C, metrics, seconds, taken, scales, local_C)


def _tables(training: GroupTraining, cohort: list[int]) -> tuple[list[LocalStats], np.ndarray, list[RoundSeconds]]:
    """Return (each client's sums; [C, ...]: seconds, bytes sent, rate, steps in all, scales; seconds of each group's
    first rank) (a collective).
    """
    world, stages, sums = training.world, training.stopwatch.seconds, len(LocalStats._fields)
    learned = len(training.client.model.layers) if training.exp.router.gate_rescale == "learned" else 0
    table = np.zeros((len(cohort), sums + len(RoundSeconds._fields) + 3 + learned))
    for turn in training.turns.done:
        stats, rate, taken = turn.stats, turn.learning_rate, training.progress.steps_taken.get(turn.client, 0)
        seconds = RoundSeconds(turn.seconds, stages["wait"], stages["exchange"], stages["merge"])
        scales = np.zeros(learned) if turn.scales_L is None else turn.scales_L.numpy()
        if world.group_rank > 0:  # norm and steps are the client's, times its first rank's: count them once
            stats = stats._replace(gradient_norm=0.0, steps=0.0, bad_steps=0.0)
            seconds, rate, taken, scales = RoundSeconds(*np.zeros(len(seconds))), 0.0, 0, np.zeros(learned)
        sent = training.aggregator.bytes_sent / len(training.turns.done)  # a group's turns travel together
        table[cohort.index(turn.client)] = [*stats, *seconds, sent, rate, taken, *scales]
    table_G4 = np.zeros((len(training.exp.trainers), len(RoundSeconds._fields)))
    if world.group_rank == 0:
        local = sum(turn.seconds for turn in training.turns.done)
        table_G4[world.group] = [local, *(stages.get(stage, 0.0) for stage in ("wait", "exchange", "merge"))]
    whole = world.sum(np.concatenate([table.ravel(), table_G4.ravel()]))
    table, table_G4 = whole[: table.size].reshape(table.shape), whole[table.size :].reshape(table_G4.shape)
    return [LocalStats(*row) for row in table[:, :sums]], table[:, sums:], [RoundSeconds(*row) for row in table_G4]
