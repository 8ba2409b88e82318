"""Predict the seconds of a step and a round from what a device does in a second: a roofline, plus messages [ours].

A step of a rank takes max(FLOPs / rate, bytes / bandwidth) + bytes sent / network: arithmetic and memory overlap,
messages do not. Nothing else is counted: not the start of operations, not Python, not what ranks of a host share.
Pure functions on `inputs.PlanInput`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import frozen_parts, optimizer_bytes, training_bytes
from ubsmoe_ds.planning.plan import ClientPlan
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


def _of_client(inputs: PlanInput, number: int, cost: ClientPlan, device: Device) -> ClientSeconds:
    exp, rows, setup = inputs.exp, inputs.row_lengths[number].rows, rank_setup(inputs, number)
    arithmetic = cost.step_flops / setup.ranks / device.flops
    traffic = step_traffic(setup) / device.bandwidth
    sent = 0.0 if device.network is None else 1 / device.network
    step = max(arithmetic, traffic) + cost.step_bytes * sent
    steps = exp.local_steps(exp.clients[number], rows)
    evaluation_flops = cost.round_flops - steps * cost.step_flops  # over `evaluation.every` already
    evaluation = max(
        evaluation_flops / setup.ranks / device.flops, _evaluation_traffic(inputs, number, setup) / device.bandwidth
    )
    exchange = max(cost.sent_bytes, cost.got_bytes) / setup.ranks * sent
    return ClientSeconds(step, steps * step + evaluation + exchange, arithmetic, traffic)


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
