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
    """A client's number of ranks, their expert parallelism, and the gradient accumulation steps of all clients."""

    ranks: int
    expert_parallel: int
    accumulation: int


class Fit(NamedTuple):
    """The largest settings that fit a given memory, each with the client's other settings unchanged.

    fits_now: whether the client fits as it is; k: largest K, 0: none; capacity: largest capacity factor, inf: nothing
    dropped, 0: none; layout: fewest ranks with the expert parallelism they need, None: no number of ranks fits.
    has_room: whether the hosts have room for them.
    """

    fits_now: bool
    k: int
    capacity: float
    layout: Layout | None
    has_room: bool = True


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
    layouts = [layout for layout in _layouts(inputs, number) if _layout_fits(inputs, number, layout, memory)]
    rooms = (layout for layout in layouts if _have_places(_laid_out(inputs, number, layout), slots))
    chosen = next(rooms, None)
    layout = chosen or next(iter(layouts), None)
    return Fit(bytes_needed(setup) <= memory, max(ks, default=0), capacity, layout, has_room=layout == chosen)


def _have_places(inputs: PlanInput, slots: Mapping[str, int] | None) -> bool:
    """Return whether the hosts, those that clients name among them, have room for all ranks."""
    try:
        return slots is None or bool(place(inputs.exp.clients, slots))
    except UserError:
        return False


def _layouts(inputs: PlanInput, number: int) -> Iterator[Layout]:
    """Yield the layouts that a client can have, the fewest ranks first.

    Each has the experiment's accumulation steps; where these do not divide the batch, the most below that do.
    """
    settings, experts = inputs.exp.settings(inputs.exp.clients[number]), inputs.exp.num_experts
    now = settings.gradient_accumulation_steps
    for ranks in range(1, settings.train_batch_size + 1):
        steps = next((n for n in range(now, 0, -1) if _divides(inputs, number, ranks, n)), None)
        if steps is not None:
            eps = (ep for ep in range(1, ranks + 1) if ranks % ep == 0 and experts % ep == 0)
            yield from (Layout(ranks, ep, steps) for ep in eps)


def _divides(inputs: PlanInput, number: int, ranks: int, steps: int) -> bool:
    """Return whether all clients can share their batches out, if one has so many ranks and accumulation steps."""
    clients, default = inputs.exp.clients, inputs.exp.deepspeed
    own_steps = clients[number].gradient_accumulation_steps is not None  # else it shares them with others
    for other, client in enumerate(clients):
        own = client.gradient_accumulation_steps
        is_changed = other == number or (not own_steps and own is None)
        parts = steps if is_changed else own or default.gradient_accumulation_steps
        batch = client.train_batch_size or default.train_batch_size
        if batch % ((ranks if other == number else client.ranks) * parts):
            return False
    return True


def _laid_out(inputs: PlanInput, number: int, layout: Layout) -> PlanInput:
    changed = inputs.changed(number, ranks=layout.ranks, expert_parallel=layout.expert_parallel)
    return changed.accumulating(layout.accumulation, number)


def _layout_fits(inputs: PlanInput, number: int, layout: Layout, memory: float) -> bool:
    """Return whether a client fits with a layout, and fewer accumulation steps leave those that fit fitting."""
    changed = _laid_out(inputs, number, layout)
    if bytes_needed(rank_setup(changed, number)) > memory:
        return False
    if layout.accumulation == _accumulation(inputs, number):
        return True
    others = (other for other in range(len(inputs.exp.clients)) if other != number)
    return all(
        bytes_needed(rank_setup(changed, other)) <= memory or bytes_needed(rank_setup(inputs, other)) > memory
        for other in others
    )


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
    for text, changed in _changes(inputs, number, fit if fit.has_room else fit._replace(layout=None)):
        needed = bytes_needed(rank_setup(changed, number))
        if needed <= memory:
            return f"{text} needs {needed / 1e9:.3g} GB a rank"
    if math.isinf(fit.capacity):
        return f"clients.{number}.capacity_factor=null fits, which keeps all tokens"
    if fit.capacity:
        return f"clients.{number}.capacity_factor={fit.capacity} would fit, which drops tokens"
    if fit.k and inputs.exp.budget_scales == "experts":
        budget = math.ceil(1000 * fit.k / inputs.exp.k_max) / 1000
        return f"clients.{number}.budget={budget:g} (K {fit.k}) fits"
    if fit.layout is not None:
        return f"{_layout_text(inputs, number, fit.layout)} would fit, but the hosts have no room for it; use more"
    return "none of K, capacity, batches and number of ranks makes it fit alone; use larger devices"


def _changes(inputs: PlanInput, number: int, fit: Fit) -> Iterator[tuple[str, PlanInput]]:
    """Yield changes that leave alone what is learned, but for rounding: as text, and what they lead to."""
    size = inputs.exp.evaluation.batch_size
    while size > 1:
        size //= 2
        yield f"evaluation.batch_size={size}", inputs.evaluating(size)
    if fit.layout is not None:
        yield _layout_text(inputs, number, fit.layout), _laid_out(inputs, number, fit.layout)
    client = inputs.exp.clients[number]
    settings = inputs.exp.settings(client)
    for steps in range(settings.gradient_accumulation_steps + 1, settings.train_batch_size // client.ranks + 1):
        if _divides(inputs, number, client.ranks, steps):
            yield f"{_accumulation_key(inputs, number)}={steps}", inputs.accumulating(steps, number)


def _layout_text(inputs: PlanInput, number: int, layout: Layout) -> str:
    key = f"clients.{number}"
    text = f"{key}.ranks={layout.ranks} {key}.expert_parallel={layout.expert_parallel}"
    if layout.accumulation != _accumulation(inputs, number):
        text += f" {_accumulation_key(inputs, number)}={layout.accumulation}"
    return text


def _accumulation(inputs: PlanInput, number: int) -> int:
    """Return a client's gradient accumulation steps."""
    return inputs.exp.settings(inputs.exp.clients[number]).gradient_accumulation_steps


def _accumulation_key(inputs: PlanInput, number: int) -> str:
    """Return the key that sets a client's gradient accumulation steps."""
    own = inputs.exp.clients[number].gradient_accumulation_steps is not None
    return f"{f'clients.{number}' if own else 'deepspeed'}.gradient_accumulation_steps"
