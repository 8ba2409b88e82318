"""Find what fits a given memory: the largest K and capacity, the fewest ranks; refuse what does not, with a remedy."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching.placement import place
from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import largest_phase, memory_by_phase
from ubsmoe_ds.planning.rank_setup import RankSetup

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CAPACITY_STEP = 0.25  # in which capacity factors are tried
LARGEST_CAPACITY = 4.0


class Layout(NamedTuple):
    """A client's number of ranks and their expert parallelism."""

    ranks: int
    expert_parallel: int


class Fit(NamedTuple):
    """The largest settings that fit a given memory, each with the client's other settings unchanged.

    fits_now: whether the client fits as it is; k: largest K, 0: none; capacity: largest capacity factor, inf: nothing
    dropped, 0: none; layout: fewest ranks with the expert parallelism they need, None: no number of ranks fits.
    """

    fits_now: bool
    k: int
    capacity: float
    layout: Layout | None


def parse_bytes(text: str) -> float:
    """Return the bytes of a text such as 80G, 79.6GiB or 512M; K, M, G, T are powers of 1,000, KiB etc. of 1,024.

    Raises:
        UserError: for anything else.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([KMGT]I?)B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--device-memory: {text!r} is no amount of memory; write it like 80G, 80GiB or 512M")
    return float(match[1]) * UNITS[match[2]]


def bytes_needed(setup: RankSetup) -> float:
    """Return the peak bytes of a rank."""
    return largest_phase(memory_by_phase(setup))[1]


def fit(inputs: PlanInput, number: int, memory: float, slots: Mapping[str, int] | None = None) -> Fit:
    """Return what fits of one client.

    Args:
        inputs: of the plan.
        number: of the client.
        memory: bytes of a rank.
        slots: name of a host -> ranks of all clients that it has room for; None: there is room for any.
    """
    setup = rank_setup(inputs, number)
    ks = [k for k in range(1, inputs.exp.k_max + 1) if bytes_needed(replace(setup, k=k)) <= memory]
    steps = [CAPACITY_STEP * n for n in range(1, round(LARGEST_CAPACITY / CAPACITY_STEP) + 1)]
    capacities = [(math.inf, None), *((factor, factor) for factor in reversed(steps))]
    capacity = next((f for f, given in capacities if bytes_needed(replace(setup, capacity=given)) <= memory), 0.0)
    changes = ((layout, inputs.changed(number, **layout._asdict())) for layout in _layouts(inputs))
    layouts = (
        layout
        for layout, changed in changes
        if bytes_needed(rank_setup(changed, number)) <= memory and _have_places(changed, slots)
    )
    return Fit(bytes_needed(setup) <= memory, max(ks, default=0), capacity, next(layouts, None))


def _have_places(inputs: PlanInput, slots: Mapping[str, int] | None) -> bool:
    """Return whether the hosts, those that clients name among them, have room for all ranks."""
    try:
        return slots is None or bool(place(inputs.exp.clients, slots))
    except UserError:
        return False


def _layouts(inputs: PlanInput) -> Iterator[Layout]:
    """Yield the layouts that a client can have, the fewest ranks first."""
    settings, experts = inputs.exp.deepspeed, inputs.exp.num_experts
    most = settings.train_batch_size // settings.gradient_accumulation_steps
    for ranks in range(1, most + 1):
        if most % ranks == 0:
            yield from (Layout(ranks, ep) for ep in range(1, ranks + 1) if ranks % ep == 0 and experts % ep == 0)


def check_fits(inputs: PlanInput, fits: Sequence[Fit], memory: float) -> None:
    """Refuse a plan in which a client does not fit.

    Raises:
        UserError: naming the first client, what it needs, what there is, and what would fit.
    """
    failing = [number for number, fit in enumerate(fits) if not fit.fits_now]
    if failing:
        number, setup = failing[0], rank_setup(inputs, failing[0])
        phase, needed = largest_phase(memory_by_phase(setup))
        more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
        raise UserError(
            f"clients.{number}: {inputs.exp.clients[number].name!r} needs {needed / 1e9:.3g} GB a rank ({phase}) at K "
            f"{setup.k}, there are {memory / 1e9:.3g} GB; {_remedy(inputs, number, fits[number], memory)}{more}"
        )


def _remedy(inputs: PlanInput, number: int, fit: Fit, memory: float) -> str:
    """Return a change that makes the client fit; those that change least of what is learned come first."""
    if fit.layout is not None:
        needed = bytes_needed(rank_setup(inputs.changed(number, **fit.layout._asdict()), number)) / 1e9
        key, (ranks, expert_parallel) = f"clients.{number}", fit.layout
        return f"{key}.ranks={ranks} {key}.expert_parallel={expert_parallel} needs {needed:.3g} GB a rank"
    micro, client = inputs.exp.deepspeed.gradient_accumulation_steps, inputs.exp.clients[number]
    rows = inputs.exp.deepspeed.train_batch_size // client.ranks
    for steps in (n for n in range(micro + 1, rows + 1) if _accumulation_is_allowed(inputs, n)):
        needed = bytes_needed(rank_setup(inputs.accumulating(steps), number))
        if needed <= memory:
            return f"deepspeed.gradient_accumulation_steps={steps} needs {needed / 1e9:.3g} GB a rank"
    if math.isinf(fit.capacity):
        return f"clients.{number}.capacity_factor=null fits, which keeps all tokens"
    if fit.capacity:
        return f"clients.{number}.capacity_factor={fit.capacity} would fit, which drops tokens"
    if fit.k and inputs.exp.budget_scales == "experts":
        budget = math.ceil(1000 * fit.k / inputs.exp.k_max) / 1000
        return f"clients.{number}.budget={budget:g} (K {fit.k}) fits"
    return "no K, capacity or number of ranks makes it fit; use larger devices, or lower evaluation.batch_size"


def _accumulation_is_allowed(inputs: PlanInput, steps: int) -> bool:
    return all(inputs.exp.deepspeed.train_batch_size % (client.ranks * steps) == 0 for client in inputs.exp.clients)
