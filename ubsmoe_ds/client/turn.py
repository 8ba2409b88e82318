"""A turn: one client's local steps on its group, and what they leave behind until the merge.

Shapes: L layers, E experts, F expert width, X = E + 1.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.client.engine import Client, LocalStats
from ubsmoe_ds.client.finite import all_finite


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

    client: its number. update: what the client has changed, as it travels; None: it is added up, see `Turns`. part: see
    `OwnPart`. stats: sums over this rank's local steps. seconds: of the local steps. learning_rate: of the last.
    steps_taken: in the run so far. routed_LX: see `Client.routed_counts`. sums_LEX: see `moment_sums`; None without,
    and where it is added up. squares_LE2: see `Client.gradient_squares`; None without. scales_L: what the gates have
    learned for the client alone; None without. slot: its place among its group's turns in the round. length: L2 norm of
    the whole update over the work done, not finite if that is not. refused: numbers of the units that held NaN or Inf,
    and are zero since. control: change of SCAFFOLD's c_i, as it travels; None without.
    """

    client: int
    update: Tensor | None
    part: OwnPart
    stats: LocalStats
    seconds: float
    learning_rate: float
    steps_taken: int
    routed_LX: Tensor
    sums_LEX: Tensor | None = field(default=None)
    squares_LE2: Tensor | None = field(default=None)
    scales_L: Tensor | None = field(default=None)
    slot: int = 0
    length: float = 0.0
    refused: list[int] = field(default_factory=list)
    control: Tensor | None = field(default=None)


@dataclass
class Turns:
    """Hold what this rank has of the turns that its group has completed in the current round.

    done: the turns, in order. total: sum over those that are added up of weight times update, as it travels; None:
    there are none. total_LEX: the same of their moments; None without.
    """

    done: list[Turn] = field(default_factory=list)
    total: Tensor | None = field(default=None)
    total_LEX: Tensor | None = field(default=None)

    def add_up(self, turn: Turn, weight: Tensor | float, moment_weight: float) -> None:
        """Add one of the turns to the sums, and forget what it had of its own.

        Args:
            turn: one of `done`.
            weight: factor of its update, one number or one per element.
            moment_weight: factor of its moments.
        """
        assert turn.update is not None
        if self.total is None:
            self.total = turn.update.mul_(weight)
        elif isinstance(weight, Tensor):
            self.total.addcmul_(turn.update, weight)
        else:
            self.total.add_(turn.update, alpha=weight)
        if turn.sums_LEX is not None:
            part = turn.sums_LEX * moment_weight
            self.total_LEX = part if self.total_LEX is None else self.total_LEX.add_(part)
        turn.update, turn.sums_LEX = None, None


def moment_sums(client: Client) -> Tensor | None:
    """Return the sums of the experts' moments since the counts began, without NaN and Inf; None without moments."""
    if client.moments is None:
        return None
    sums_LEX = client.moments.sums()
    if all_finite(sums_LEX):
        return sums_LEX
    valid_LE1 = torch.isfinite(sums_LEX).all(dim=-1, keepdim=True)
    return torch.where(valid_LE1, sums_LEX, 0.0)
