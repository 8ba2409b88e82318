"""What fits a given memory: the largest K and capacity, the fewest ranks; and refusing what does not, with a remedy."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching.placement import place
from ubsmoe_ds.planning.memory_model import peak, phases
from ubsmoe_ds.planning.plan import Job, rank_load
from ubsmoe_ds.planning.rank_load import RankLoad

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CAPACITY_STEP = 0.25  # in which capacity factors are tried
LARGEST_CAPACITY = 4.0


class Layout(NamedTuple):
    """Of a client's ranks."""

    ranks: int
    expert_parallel: int


class Fit(NamedTuple):
    """What fits a given memory: largest K (0: none), largest capacity factor (inf: nothing dropped, 0: none), fewest
    ranks with the expert parallelism they need, or None.
    """

    as_it_is: bool
    k: int
    capacity: float
    layout: Layout | None


def memory_bytes(text: str) -> float:
    """Of a text such as 80G, 79.6GiB or 512M; K, M, G and T are powers of 1,000, KiB and so on of 1,024.

    Raises:
        UserError: for anything else.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([KMGT]I?)B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--device-memory: {text!r} is no amount of memory; write it like 80G, 80GiB or 512M")
    return float(match[1]) * UNITS[match[2]]


def need(load: RankLoad) -> float:
    """Bytes that a rank needs."""
    return peak(phases(load))[1]


def fit(job: Job, number: int, memory: float, slots: Mapping[str, int] | None = None) -> Fit:
    """What of one client fits.

    Args:
        job: everything.
        number: of the client.
        memory: bytes of a rank.
        slots: name of a host -> ranks that it has room for, all clients' together; None: there is room for any.
    """
    load = rank_load(job, number)
    ks = [k for k in range(1, job.exp.k_max + 1) if need(replace(load, k=k)) <= memory]
    steps = [CAPACITY_STEP * n for n in range(1, round(LARGEST_CAPACITY / CAPACITY_STEP) + 1)]
    capacities = [(math.inf, None), *((factor, factor) for factor in reversed(steps))]
    capacity = next((f for f, given in capacities if need(replace(load, capacity=given)) <= memory), 0.0)
    changes = ((layout, job.changed(number, **layout._asdict())) for layout in _layouts(job))
    layouts = (
        layout
        for layout, changed in changes
        if need(rank_load(changed, number)) <= memory and _have_places(changed, slots)
    )
    return Fit(need(load) <= memory, max(ks, default=0), capacity, next(layouts, None))


def _have_places(job: Job, slots: Mapping[str, int] | None) -> bool:
    """Whether there are hosts for all ranks, those that clients name among them."""
    try:
        return slots is None or bool(place(job.exp.clients, slots))
    except UserError:
        return False


def _layouts(job: Job) -> Iterator[Layout]:
    """All that a client can have, the fewest ranks first."""
    settings, experts = job.exp.deepspeed, job.exp.num_experts
    most = settings.train_batch_size // settings.gradient_accumulation_steps
    for ranks in range(1, most + 1):
        if most % ranks == 0:
            yield from (Layout(ranks, ep) for ep in range(1, ranks + 1) if ranks % ep == 0 and experts % ep == 0)


def check(job: Job, fits: Sequence[Fit], memory: float) -> None:
    """Refuse what cannot fit.

    Raises:
        UserError: naming the first client, what it needs, what there is, and what would fit.
    """
    failing = [number for number, fit in enumerate(fits) if not fit.as_it_is]
    if failing:
        number, load = failing[0], rank_load(job, failing[0])
        phase, needed = peak(phases(load))
        more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
        raise UserError(
            f"clients.{number}: {job.exp.clients[number].name!r} needs {needed / 1e9:.3g} GB a rank ({phase}) at K "
            f"{load.k}, there are {memory / 1e9:.3g} GB; {_remedy(job, number, fits[number], memory)}{more}"
        )


def _remedy(job: Job, number: int, fit: Fit, memory: float) -> str:
    """What fits, in the order in which it changes least of what is learned."""
    if fit.layout is not None:
        needed = need(rank_load(job.changed(number, **fit.layout._asdict()), number)) / 1e9
        key, (ranks, expert_parallel) = f"clients.{number}", fit.layout
        return f"{key}.ranks={ranks} {key}.expert_parallel={expert_parallel} needs {needed:.3g} GB a rank"
    micro, client = job.exp.deepspeed.gradient_accumulation_steps, job.exp.clients[number]
    rows = job.exp.deepspeed.train_batch_size // client.ranks
    for steps in (n for n in range(micro + 1, rows + 1) if _accumulation_is_allowed(job, n)):
        needed = need(rank_load(job.accumulating(steps), number))
        if needed <= memory:
            return f"deepspeed.gradient_accumulation_steps={steps} needs {needed / 1e9:.3g} GB a rank"
    if math.isinf(fit.capacity):
        return f"clients.{number}.capacity_factor=null fits, which keeps all tokens"
    if fit.capacity:
        return f"clients.{number}.capacity_factor={fit.capacity} would fit, which drops tokens"
    if fit.k and job.exp.budget_scales == "experts":
        budget = math.ceil(1000 * fit.k / job.exp.k_max) / 1000
        return f"clients.{number}.budget={budget:g} (K {fit.k}) fits"
    return "no K, capacity or number of ranks makes it fit; use larger devices, or lower evaluation.batch_size"


def _accumulation_is_allowed(job: Job, steps: int) -> bool:
    return all(job.exp.deepspeed.train_batch_size % (client.ranks * steps) == 0 for client in job.exp.clients)
