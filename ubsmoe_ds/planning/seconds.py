"""Predict the seconds of a step and a round from what a device does in a second: a roofline, plus messages [ours].

A step of a rank takes max(FLOPs / rate, bytes / bandwidth) + bytes sent / network: arithmetic and memory overlap,
messages do not. Nothing else is counted: not the start of operations, not Python, not what ranks of a host share.
Where clients take turns, a group's turns follow one another and the groups wait for the longest.
Pure functions on `inputs.PlanInput`.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ubsmoe_ds.planning.group_plan import Turns
from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import frozen_parts, optimizer_bytes, training_bytes
from ubsmoe_ds.planning.plan import ClientPlan, client_step_flops, evaluation_flops, group_exchange_bytes, step_bytes
from ubsmoe_ds.planning.rank_setup import RankSetup


class Device(NamedTuple):
    """Hold what a rank's device does in a second.

    flops: of the experts' products; bandwidth: bytes read or written in its memory; network: bytes sent to other ranks,
    None: unknown, messages are not counted.
    """

    flops: float
    bandwidth: float
    network: float | None = None


class ClientSeconds(NamedTuple):
    """Seconds of a client's step and round; a step's arithmetic and memory traffic, of which the longer one counts."""

    step: float
    round: float
    arithmetic: float
    traffic: float


def seconds(inputs: PlanInput, plans: Sequence[ClientPlan], device: Device) -> list[ClientSeconds]:
    """Return the seconds of each client; a round is its local steps, its share of the evaluation, and the exchange."""
    return [_of_client(inputs, number, cost, device) for number, cost in enumerate(plans)]


class RoundSeconds(NamedTuple):
    """Seconds of a round of a population, means over rounds.

    turns: local steps of the group that is busy longest; evaluation, exchange: of the group that takes longest there.
    waiting: share of the groups' time before the merge in which they wait for that group.
    longest: how many rounds each group is busy longest in.
    """

    turns: float
    evaluation: float
    exchange: float
    waiting: float
    longest: list[int]

    @property
    def round(self) -> float:
        """Return the length of a round."""
        return self.turns + self.evaluation + self.exchange


def _of_client(inputs: PlanInput, number: int, cost: ClientPlan, device: Device) -> ClientSeconds:
    exp, rows, setup = inputs.exp, inputs.row_lengths[number].rows, rank_setup(inputs, number)
    step, arithmetic, traffic = _step(setup, cost.step_flops, cost.step_bytes, device)
    steps = exp.local_steps(exp.clients[number], rows)
    evaluation = max(
        (cost.round_flops - steps * cost.step_flops) / setup.ranks / device.flops,  # over `evaluation.every` already
        _evaluation_traffic(inputs, number, setup) / device.bandwidth,
    )
    exchange = max(cost.sent_bytes, cost.got_bytes) / setup.ranks * _per_byte(device)
    return ClientSeconds(step, steps * step + evaluation + exchange, arithmetic, traffic)


def _step(setup: RankSetup, flops: float, sent: float, device: Device) -> tuple[float, float, float]:
    """Return the seconds of (a step, its arithmetic, its memory traffic) of all ranks' FLOPs and a rank's bytes."""
    arithmetic, traffic = flops / setup.ranks / device.flops, step_traffic(setup) / device.bandwidth
    return max(arithmetic, traffic) + sent * _per_byte(device), arithmetic, traffic


def _per_byte(device: Device) -> float:
    return 0.0 if device.network is None else 1 / device.network


def round_seconds(
    inputs: PlanInput, rounds: Sequence[Turns], evaluated: Sequence[Sequence[int]], device: Device
) -> RoundSeconds:
    """Return the seconds of a round in which groups train clients in turn.

    Args:
        inputs: of the plan.
        rounds: the schedule of each round.
        evaluated: clients on whose own rows each group evaluates them.
        device: of every rank.
    """
    exp, groups = inputs.exp, range(len(evaluated))
    seconds_of: dict[tuple[int, int], float] = {}

    def turn(client: int, group: int) -> float:
        if (client, group) not in seconds_of:
            setup = rank_setup(inputs, client, group)
            step, *_ = _step(setup, client_step_flops(inputs, client, setup), step_bytes(setup), device)
            seconds_of[client, group] = step * exp.local_steps(exp.clients[client], inputs.row_lengths[client].rows)
        return seconds_of[client, group]

    busy_RG = [[sum(turn(client, group) for client in turns[group]) for group in groups] for turns in rounds]
    sent_RG = [[group_exchange_bytes(inputs, turns, group) for group in groups] for turns in rounds]
    longest = [max(groups, key=of_round.__getitem__) for of_round in busy_RG]
    return RoundSeconds(
        turns=statistics.mean(map(max, busy_RG)),
        evaluation=max(_group_evaluation(inputs, group, evaluated[group], device) for group in groups),
        exchange=statistics.mean(map(max, sent_RG)) * _per_byte(device),
        waiting=statistics.mean(1 - statistics.mean(of_round) / max(of_round) for of_round in busy_RG),
        longest=[longest.count(group) for group in groups],
    )


def _group_evaluation(inputs: PlanInput, group: int, evaluated: Sequence[int], device: Device) -> float:
    """Return the seconds in which a rank evaluates its part of each view's common rows, and of its group's own rows."""
    exp, total = inputs.exp, 0.0
    views = [exp.views.index(view) for view in dict.fromkeys(exp.views)]
    common = [(client, inputs.row_lengths[client].eval_rows - inputs.row_lengths[client].own_rows) for client in views]
    own = [(client, inputs.row_lengths[client].own_rows) for client in evaluated]
    ranks = exp.trainers[group].ranks
    shared = [(client, rows / exp.world_size) for client, rows in common] + [(c, rows / ranks) for c, rows in own]
    for client, rows in shared:
        setup = rank_setup(inputs, client, group)
        batches = math.ceil(rows / exp.evaluation.batch_size) / exp.evaluation.every
        flops = evaluation_flops(inputs, client, setup, rows)
        total += max(flops / device.flops, batches * pass_traffic(setup) / device.bandwidth)
    return total


def step_traffic(setup: RankSetup) -> float:
    """Return the bytes that a rank reads and writes in a step.

    For each micro-batch the frozen weights are read forward and backward, and once more if layers are computed again;
    activations are written and read. The optimiser reads and writes weights, masters and moments. That experts without
    tokens are not read is left out.
    """
    kept = training_bytes(replace(setup, recomputing=False))
    micro = (2 + setup.recomputing) * pass_traffic(setup) + 2 * (kept.tokens + kept.rows)
    return setup.micro_batches * micro + 2 * optimizer_bytes(setup).kept


def pass_traffic(setup: RankSetup) -> float:
    """Return the bytes of frozen weights that a pass moves.

    Quantised ones are read, written as whole values, and read again.
    """
    parts = frozen_parts(setup)
    if setup.quantize is None:
        return sum(parts)
    return parts.whole + parts.matrices + 2 * frozen_parts(replace(setup, quantize=None)).matrices


def _evaluation_traffic(inputs: PlanInput, number: int, setup: RankSetup) -> float:
    """Return the bytes of weights that a rank reads in a round's evaluation, once a batch."""
    exp = inputs.exp
    sharers = sum(c.ranks for c, view in zip(exp.clients, exp.views, strict=True) if view == exp.views[number])
    batches = math.ceil(inputs.row_lengths[number].eval_rows / sharers / exp.evaluation.batch_size)
    return batches * pass_traffic(setup) / exp.evaluation.every


def lines(inputs: PlanInput, plans: Sequence[ClientPlan], device: Device) -> Iterator[str]:
    """Yield the prediction: the rates, a line for each client, and the round's length."""
    network = "messages not counted" if device.network is None else f"{device.network:.3g} bytes/s sent"
    yield f"seconds at {device.flops:.3g} FLOP/s and {device.bandwidth:.3g} bytes/s of a rank's device, {network}:"
    clients = seconds(inputs, plans, device)
    for client, found in zip(inputs.exp.clients, clients, strict=True):
        bound = "arithmetic" if found.arithmetic >= found.traffic else "memory"
        yield f"  {client.name}: {found.step:.3g} s a step (bound by {bound}), {found.round:.3g} s a round"
    slowest = max(range(len(clients)), key=lambda number: clients[number].round)
    yield f"  a round takes {clients[slowest].round:.3g} s, that of {inputs.exp.clients[slowest].name}"


def round_line(inputs: PlanInput, found: RoundSeconds, device: Device) -> str:
    """Return the prediction of a population's rounds."""
    network = "" if device.network is not None else ", messages not counted"
    longest = max(range(len(found.longest)), key=found.longest.__getitem__)
    return (
        f"seconds at {device.flops:.3g} FLOP/s and {device.bandwidth:.3g} bytes/s of a rank's device{network}: a round "
        f"takes {found.round:.3g} s in the mean: turns {found.turns:.3g} s, evaluation {found.evaluation:.3g} s, "
        f"exchange {found.exchange:.3g} s; {inputs.exp.trainers[longest].name} is busy longest in "
        f"{found.longest[longest]} of {sum(found.longest)} rounds, groups wait {100 * found.waiting:.0f} % of the turns"
    )
