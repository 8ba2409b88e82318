"""A turn: one client's local steps on its group, and what they leave behind until the merge.

Shapes: L layers, E experts, F expert width, X = E + 1.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.client.engine import Client, LocalStats


class OwnPart(NamedTuple):
    """One rank's part of what a client's row in the round's statistics sums up.

    squares: sum of squares of the update as far as this rank sends it.
    lora_rank: the client's LoRA rank after the round.
    work: part of the round's work that the client did, 0 to 1.
    """

    squares: float
    lora_rank: int
    work: float


@dataclass
class Turn:
    """Hold the result of a client's local steps on one rank.

    client: its number. update: what the client has changed, as it travels. part: see `OwnPart`. stats: sums over this
    rank's local steps. seconds: of the local steps. learning_rate: of the last. routed_LX: see `Client.routed_counts`.
    sums_LEX: see `moment_sums`; None without. squares_LE2: see `Client.gradient_squares`; None without. scales_L: what
    the gates have learned for the client alone; None without. slot: its place among its group's turns in the round.
    control: change of SCAFFOLD's c_i, laid out like the update; None without.
    """

    client: int
    update: Tensor
    part: OwnPart
    stats: LocalStats
    seconds: float
    learning_rate: float
    routed_LX: Tensor
    sums_LEX: Tensor | None = field(default=None)
    squares_LE2: Tensor | None = field(default=None)
    scales_L: Tensor | None = field(default=None)
    slot: int = 0
    control: Tensor | None = field(default=None)


def moment_sums(client: Client) -> Tensor | None:
    """Return the sums of the experts' moments since the counts began, without NaN and Inf; None without moments."""
    if client.moments is None:
        return None
    sums_LEX = client.moments.sums()
    valid_LE1 = torch.isfinite(sums_LEX).all(dim=-1, keepdim=True)
    return torch.where(valid_LE1, sums_LEX, 0.0)
