"""Plan groups that train clients in turn: their memory, and which shape of groups suits a number of devices.

Pure functions on `inputs.PlanInput`; nothing is read or started here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ubsmoe_ds.config.consistency import problems
from ubsmoe_ds.config.population import GroupConfig
from ubsmoe_ds.planning.cohort import Cohorts
from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import largest_phase, memory_by_phase
from ubsmoe_ds.planning.plan import step_bytes
from ubsmoe_ds.planning.schedule import assign, loads
from ubsmoe_ds.planning.turn_cost import on_groups, turn_flops

Turns = Sequence[Sequence[int]]  # clients of each group in a round, in order
# FLOPs that a device does while it sends a byte inside its group on one host: assumed, not measured
CPU_FLOPS_PER_BYTE = 20.0  # 100 GFLOP/s, 5 GB/s
CUDA_FLOPS_PER_BYTE = 1000.0  # 300 TFLOP/s, 300 GB/s


class GroupPlan(NamedTuple):
    """The cost of one group.

    phases: bytes by phase on each of its ranks, for the client that needs most in it; client: number of the one that
    needs most of all. turns: most of a round. step_bytes: that a rank sends in a step, with the client that sends most.
    """

    phases: dict[str, float]
    client: int
    turns: int
    step_bytes: float


class GroupShape(NamedTuple):
    """Groups that are all alike, and what comes of them.

    time: FLOPs of the rank that is busy longest in a round, with those that it could have done while it sent bytes
    inside its group; mean over rounds. idle: share of all devices' time in which they wait, those in no group too, mean
    over rounds. plan: of each group.
    """

    ranks: int
    expert_parallel: int
    groups: int
    time: float
    idle: float
    plan: GroupPlan


def plan_group(inputs: PlanInput, group: int, rounds: Sequence[Turns]) -> GroupPlan:
    """Return the cost of a group that trains clients in turn.

    Every group evaluates all views, so the largest K counts for evaluation whoever it trains.

    Args:
        inputs: of the plan.
        group: its number.
        rounds: the schedule of each round.
    """
    exp, phases = inputs.exp, dict[str, float]()
    turns = max((len(of_round[group]) for of_round in rounds), default=1)
    largest_k = max(map(exp.active_experts, exp.clients))
    needed: dict[int, float] = {}
    sent = 0.0
    for client in exp.clients_for(group):
        setup = rank_setup(inputs, client, group, max(1, turns))
        own = memory_by_phase(setup) | {"evaluate": memory_by_phase(replace(setup, k=largest_k))["evaluate"]}
        needed[client] = largest_phase(own)[1]
        phases = {phase: max(size, phases.get(phase, 0.0)) for phase, size in own.items()}
        sent = max(sent, step_bytes(setup))
    return GroupPlan(phases, max(needed, key=needed.__getitem__), turns, sent)


def shapes(
    inputs: PlanInput, slots: Sequence[int], rounds: int, flops_per_byte: float | None = None
) -> list[GroupShape]:
    """Return the shapes of groups that the config allows on these devices, the best first.

    Best is the shortest round; then the fewest bytes inside a group, the least memory. A group's ranks are on one host,
    and there are at most as many groups as clients in a cohort.

    Args:
        inputs: of the plan; its own groups do not count.
        slots: devices of each host.
        rounds: of which the first so many are scheduled.
        flops_per_byte: FLOPs in the time in which a rank sends a byte; None: as assumed for the kind of device.
    """
    if flops_per_byte is None:
        flops_per_byte = CPU_FLOPS_PER_BYTE if inputs.on_cpu else CUDA_FLOPS_PER_BYTE
    exp, lengths = inputs.exp, inputs.row_lengths
    cohorts = Cohorts(exp, [of_client.rows for of_client in lengths])
    of_rounds = [cohorts.of_round(number) for number in range(1, rounds + 1)]
    tokens = [round(of_client.mean_length * of_client.rows) for of_client in lengths]
    flops_C = [turn_flops(exp, inputs.shape, c, of.rows, tokens[c]) for c, of in enumerate(lengths)]
    most_ranks = min(max(slots), *(exp.settings(client).train_batch_size for client in exp.clients))
    found = []
    for ranks in range(1, most_ranks + 1):
        count = min(sum(devices // ranks for devices in slots), exp.cohort_size)
        for parallel in (part for part in range(1, ranks + 1) if ranks % part == 0):
            tried = _with_groups(inputs, ranks, parallel, count)
            if tried is not None:
                found.append(_shape(tried, sum(slots), of_rounds, (flops_C, flops_per_byte)))
    return sorted(found, key=lambda s: (s.time, s.plan.step_bytes, largest_phase(s.plan.phases)[1], s.ranks))


def _with_groups(inputs: PlanInput, ranks: int, expert_parallel: int, count: int) -> PlanInput | None:
    """Return a copy with so many groups that are alike; None if the config's checks refuse them."""
    groups = [GroupConfig(name=f"g{n}", ranks=ranks, expert_parallel=expert_parallel) for n in range(count)]
    alone = {"ranks": 1, "expert_parallel": 1, "hosts": None}  # keys that belong to groups
    clients = [client.model_copy(update=alone) for client in inputs.exp.clients]
    exp = inputs.exp.model_copy(update={"groups": groups, "clients": clients})
    return None if problems(exp) else replace(inputs, exp=exp)


def _shape(
    inputs: PlanInput, devices: int, cohorts: Sequence[Sequence[int]], work: tuple[Sequence[float], float]
) -> GroupShape:
    """Return what comes of an experiment's groups, which are all alike.

    Clients are assigned as a run does it, by their FLOPs alone.

    Args:
        inputs: with the groups.
        devices: number of devices.
        cohorts: clients of each round.
        work: FLOPs of each client's turn, and FLOPs a byte.
    """
    exp, (flops_C, flops_per_byte) = inputs.exp, work
    assert exp.groups is not None
    first, count = exp.groups[0], len(exp.groups)
    sending = {client: flops_per_byte * _turn_bytes(inputs, client) for client in {c for part in cohorts for c in part}}
    times, idle, rounds = [], [], []
    for cohort in cohorts:
        costs = on_groups(exp, flops_C, cohort)
        turns = assign(costs, count)
        sent = [sum(sending[client] for client in clients) for clients in turns]
        busy = [computed + sends for computed, sends in zip(loads(costs, turns), sent, strict=True)]
        times.append(max(busy))
        idle.append(1 - sum(busy) * first.ranks / (devices * max(busy)))
        rounds.append(turns)
    most = max(range(len(rounds)), key=lambda n: max(map(len, rounds[n])))
    fullest = max(range(count), key=lambda group: len(rounds[most][group]))
    return GroupShape(
        first.ranks,
        first.expert_parallel,
        count,
        sum(times) / len(times),
        sum(idle) / len(idle),
        plan_group(inputs, fullest, rounds),
    )


def _turn_bytes(inputs: PlanInput, client: int) -> float:
    """Return the bytes that a rank sends inside its group in a client's turn; all groups are alike."""
    steps = inputs.exp.local_steps(inputs.exp.clients[client], inputs.row_lengths[client].rows)
    return steps * step_bytes(rank_setup(inputs, client, group=0))
