"""Add clients up under linear rules: those of a group while it trains them, so that memory does not grow with their
number, then those of all groups. A client whose update is out of proportion must be left out, which shows only when all
are there; so a group keeps its longest updates of the round apart.

Shapes: C clients of the round, U units that this rank holds, N their elements.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation import rules
from ubsmoe_ds.aggregation.exchange import Weighted
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server, Usage, unit_weights
from ubsmoe_ds.client.finite import all_finite
from ubsmoe_ds.client.turn import Turn, Turns
from ubsmoe_ds.mpi.world import World

APART = 2  # updates


class HeldUnits:
    """The units that this rank holds, as they travel.

    Args:
        every: all units of the model.
        numbers: those that this rank holds.
        lora_rank: at which they travel.
    """

    def __init__(self, every: Sequence[Unit], numbers: Sequence[int], lora_rank: int) -> None:
        self.numbers, self.units = numbers, [every[number] for number in numbers]
        self.sizes = torch.tensor([unit.size(lora_rank) for unit in self.units])

    def elements(self, value_U: Tensor) -> Tensor | float:
        """Return the value of each element, [N] fp32; one number where all are the same."""
        if bool((value_U == value_U[0]).all()):
            return float(value_U[0].float())
        return value_U.float().repeat_interleave(self.sizes)

    def refuse(self, update: Tensor) -> list[int]:
        """Set units with NaN or Inf to zero, in place; return their numbers."""
        bad = []
        for number, part in zip(self.numbers, update.split(self.sizes.tolist()), strict=True):
            if not all_finite(part):
                part.zero_()
                bad.append(number)
        return bad


def length(world: World, turn: Turn) -> float:
    """Return `Turn.length` (a collective over the group)."""
    norm = math.sqrt(float(world.sum_of_group(np.array([turn.part.squares]))[0]))
    return norm / turn.part.work if turn.part.work else 0.0


def add_up(world: World, server: Server, held: HeldUnits, turns: Turns) -> None:
    """Add turns of this group up but for the longest ones (a collective over the group).

    A turn that held NaN or Inf counts as short: it is never left out, but for the units that are refused.
    """
    apart = [turn for turn in turns.done if turn.update is not None]
    apart.sort(key=lambda turn: (turn.length if math.isfinite(turn.length) else 0.0, turn.client))
    for turn in apart[:-APART]:
        own, weight = server.weights[turn.client], server.weights[turn.client] * turn.part.work
        counts = math.isfinite(turn.length) and turn.part.work > 0
        turns.add_up(turn, _weight_of(world, server, held, turn, weight), own if counts else 0.0)


def _weight_of(world: World, server: Server, held: HeldUnits, turn: Turn, weight: float) -> Tensor | float:
    """Return the factor of a turn's update, which is its weight before all are made to sum to one."""
    if not server.row.by_utilisation:
        return weight
    counts_LX = world.sum_of_group(turn.routed_LX.double().numpy())
    used_1LE = torch.from_numpy(counts_LX[None, :, :-1] / counts_LX[None, :, -1:].clip(min=1))
    usage = Usage(used_1LE, used_1LE[0])
    return held.elements(unit_weights(server.config, torch.tensor([weight]).double(), held.units, usage)[0])


def weighted_updates(
    turns: Turns, cohort: Sequence[int], held: HeldUnits, weight_CU: Tensor, whole: float
) -> list[Weighted]:
    """Return this group's updates and their sum, with factors by which they add up to its part of the merge.

    Args:
        turns: the group's.
        cohort: numbers of the clients of the round.
        held: what this rank holds.
        weight_CU: see `Server.unit_weights`.
        whole: sum of the weights that those are divided by; turns are added up without that.
    """
    if len(turns.done) > 1 and bool((weight_CU == weight_CU[:, :1]).all()):
        weight_CU = weight_CU[:, :1]  # one number for all units, which sums of equal columns are not to the last bit
    share_CU = rules.shares(weight_CU)
    parts = []
    for turn in turns.done:
        if turn.update is not None:
            parts.append((turn.update, held.elements(share_CU[cohort.index(turn.client)])))
    if turns.total is not None:
        sum_U = weight_CU.sum(dim=0) * whole
        parts.append((turns.total, held.elements(torch.where(sum_U > 0, 1 / sum_U.clamp_min(1e-300), 0.0))))
    return parts
