"""Compute what an experiment costs before it is started: memory, FLOPs and bytes of each client, and the straggler.

Pure functions on `inputs.PlanInput`; nothing is read or started here.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ubsmoe_ds.models.cost import flops_per_token, step_flops
from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import memory_by_phase
from ubsmoe_ds.planning.rank_setup import (
    FP32,
    RankSetup,
    copies,
    expert_rows,
    model_elements,
    trained_elements,
    with_lora_rank,
)


class ClientPlan(NamedTuple):
    """The cost of one client.

    phases: bytes by phase on each of its ranks; step_flops, round_flops: of all its ranks together.
    step_bytes: that one rank sends in a step; sent_bytes, got_bytes: of all its ranks in a round's exchange.
    time: of its round, over that of the fastest client, on equal devices.
    """

    phases: dict[str, float]
    step_flops: float
    round_flops: float
    step_bytes: float
    sent_bytes: float
    got_bytes: float
    time: float


def plan(inputs: PlanInput) -> list[ClientPlan]:
    """Return the cost of every client."""
    setups = [rank_setup(inputs, number) for number in range(len(inputs.exp.clients))]
    flops = [_flops(inputs, number, setup) for number, setup in enumerate(setups)]
    fastest = min(of_round / setup.ranks for (_, of_round), setup in zip(flops, setups, strict=True))
    plans = []
    for number, (setup, (of_step, of_round)) in enumerate(zip(setups, flops, strict=True)):
        sent, got = _exchange_bytes(inputs, number, setups)
        time = of_round / setup.ranks / fastest
        plans.append(ClientPlan(memory_by_phase(setup), of_step, of_round, step_bytes(setup), sent, got, time))
    return plans


def straggler(plans: Sequence[ClientPlan]) -> tuple[int, float, float]:
    """Return the client whose round takes longest on equal devices, and its time over the fastest's and the median."""
    times = [client.time for client in plans]
    slowest = max(range(len(times)), key=times.__getitem__)
    return slowest, times[slowest], times[slowest] / statistics.median(times)


def _flops(inputs: PlanInput, number: int, setup: RankSetup) -> tuple[float, float]:
    """Return a client's FLOPs in a step, and in a round with its share of the evaluation."""
    exp, lengths = inputs.exp, inputs.row_lengths[number]
    client, step = exp.clients[number], client_step_flops(inputs, number, setup)
    # the ranks of all clients with the same view share its evaluation rows
    sharers = [c for c, view in zip(exp.clients, exp.views, strict=True) if view == exp.views[number]]
    rows = lengths.eval_rows * setup.ranks / sum(client.ranks for client in sharers)
    return step, exp.local_steps(client, lengths.rows) * step + evaluation_flops(inputs, number, setup, rows)


def client_step_flops(inputs: PlanInput, number: int, setup: RankSetup) -> float:
    """Return the FLOPs of a client's step on all ranks that it is trained by, set up so."""
    lengths = inputs.row_lengths[number]
    rows = inputs.exp.settings(inputs.exp.clients[number]).train_batch_size
    tokens, answers = round(rows * lengths.mean_length), round(rows * lengths.mean_answers)
    context = round(lengths.mean_context or lengths.mean_length)
    layers = {"router": setup.router, "again": setup.recomputing, "spread": setup.expert_parallel > 1}
    return step_flops(setup.shape, setup.k, tokens, context, answers, **layers)


def evaluation_flops(inputs: PlanInput, number: int, setup: RankSetup, rows: float) -> float:
    """Return the FLOPs of a client's view on so many evaluation rows, over the rounds from one evaluation to the next.

    Rows are counted in parts where ranks share them.
    """
    lengths = inputs.row_lengths[number]
    head = 2 * setup.shape.hidden * setup.shape.vocab  # only at answer positions
    token = flops_per_token(setup.shape, setup.k, round(lengths.eval_mean_length)) - head
    return rows * (lengths.eval_mean_length * token + lengths.eval_answers * head) / inputs.exp.evaluation.every


def step_bytes(setup: RankSetup) -> float:
    """Return the bytes that a rank sends in one step inside its client.

    They are sums over data-parallel ranks, done as a ring, 2 (p - 1) / p of the payload; and all-to-alls of expert
    parallelism: two forward, two backward for each layer and micro-batch, and the tokens drawn for pseudo-gradients.
    """
    dense, experts = trained_elements(setup)
    replicas = setup.ranks // setup.expert_parallel
    pseudo = FP32 * experts * (setup.drawn_tokens > 0)
    # rings: dense parameters over all ranks, experts over those that hold the same ones
    sent = 2 * (setup.ranks - 1) / setup.ranks * setup.width * dense
    sent += 2 * (replicas - 1) / replicas * (setup.width * experts + pseudo)
    if setup.expert_parallel == 1:
        return sent
    # all-to-alls: inputs and outputs of the experts and their gradients; a mixture of experts adds hidden units
    s, away = setup.shape, (setup.expert_parallel - 1) / setup.expert_parallel
    slots = expert_rows(setup, setup.training.tokens, setup.k, dropping=True)
    micro = slots * setup.width * (4 * s.hidden + 3 * s.expert_width * setup.mixture)
    drawn = s.num_experts * setup.drawn_tokens
    micro += drawn * setup.width * (2 * s.hidden + 3 * s.expert_width * setup.mixture)
    return sent + away * setup.sparse_layers * setup.micro_batches * micro


def _exchange_bytes(inputs: PlanInput, number: int, setups: Sequence[RankSetup]) -> tuple[float, float]:
    """Return the bytes that all ranks of a client (send to other ranks, get from them) in a round.

    Units are owned evenly by all ranks of the job. A rank sends its part of its client's update to the owners, and what
    it owns, merged, to every rank that holds it.
    """
    exp, world, width = inputs.exp, inputs.exp.world_size, _exchanged_width(inputs)
    replies = [with_lora_rank(setup, setup.reply_rank) for setup in setups]
    updates = [model_elements(setup) for setup in setups]
    back = [model_elements(reply) * copies(reply, reply.ranks, reply.expert_parallel) for reply in replies]
    update, ranks = updates[number], exp.clients[number].ranks
    kept = back[number] / world  # what its ranks own and hold themselves
    sent = update * (1 - 1 / world) + ranks / world * sum(back) - kept
    got = back[number] - kept + (ranks * sum(updates) - update) / world
    return width * sent, width * got


def group_exchange_bytes(inputs: PlanInput, turns: Sequence[Sequence[int]], group: int) -> float:
    """Return the bytes that a rank of a group sends or gets in a round's exchange, whichever is more.

    Under linear rules a group sends the sum of its clients' updates, under the others each of them. Every rank owns as
    much of the merge as the others, and sends what it owns, merged, to all that hold it.

    Args:
        inputs: of the plan.
        turns: clients of each group in the round.
        group: its number.
    """
    exp, world = inputs.exp, inputs.exp.world_size
    setups = [rank_setup(inputs, (clients or [0])[0], number) for number, clients in enumerate(turns)]
    counts = [min(1, len(clients)) if exp.merge.is_linear else len(clients) for clients in turns]
    updates = [model_elements(setup) * count for setup, count in zip(setups, counts, strict=True)]
    replies = [with_lora_rank(setup, setup.reply_rank) for setup in setups]
    back = [model_elements(reply) * copies(reply, reply.ranks, reply.expert_parallel) for reply in replies]
    ranks, elsewhere = setups[group].ranks, 1 - 1 / world
    sent = (updates[group] / ranks + sum(back) / world) * elsewhere
    got = (back[group] / ranks + sum(updates) / world) * elsewhere
    return _exchanged_width(inputs) * max(sent, got)


def _exchanged_width(inputs: PlanInput) -> int:
    """Return the bytes of an element in the exchange, and as many again for SCAFFOLD's variates."""
    return (2 if inputs.exp.merge.payload == "bf16" else FP32) * (1 + inputs.exp.train.scaffold)
