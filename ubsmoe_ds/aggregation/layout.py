"""Describe what is exchanged (units), which ranks of the job hold it, and which rank owns it.

Shapes: U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ubsmoe_ds.config.population import Trainer


@dataclass(frozen=True)
class Unit:
    """The trainable state of one module: `numel` elements, or LoRA factors A [R, n] and B [m, R] with `lora` = (m, n).

    kind: "lora", "router" or "phi". expert: index of its expert; None: every rank of a client holds the unit.
    layer: its index among the layers with experts.
    """

    name: str
    kind: Literal["lora", "router", "phi"]
    numel: int = 0
    expert: int | None = None
    lora: tuple[int, int] | None = None
    layer: int = 0

    def size(self, lora_rank: int) -> int:
        """Return the unit's elements at a LoRA rank."""
        return self.numel if self.lora is None else lora_rank * sum(self.lora)


@dataclass(frozen=True)
class GroupLayout:
    """The job ranks of a group, `ranks` from `first` on, and how its experts are spread over them (DeepSpeed's order).

    lora_rank: LoRA rank of what it sends. reply_rank: LoRA rank of the reply; None: the same.
    """

    first: int
    ranks: int
    expert_parallel: int
    lora_rank: int = 0
    reply_rank: int | None = None

    def holders(self, unit: Unit, num_experts: int) -> range:
        """Return the job ranks that hold the unit: all of the group's, or the replicas of its expert."""
        if unit.expert is None:
            return range(self.first, self.first + self.ranks)
        place = unit.expert // (num_experts // self.expert_parallel)
        return range(self.first + place, self.first + self.ranks, self.expert_parallel)

    def sizes(self, units: Sequence[Unit], reply: bool) -> np.ndarray:
        """Return the elements of each unit on its way to the owner, or back; [U] int64."""
        rank = self.reply_rank if reply and self.reply_rank is not None else self.lora_rank
        return np.array([unit.size(rank) for unit in units], dtype=np.int64)


def owners(units: Sequence[Unit], lora_rank: int, ranks: int) -> np.ndarray:
    """Return the owner of each unit, [U]: contiguous blocks of about equal bytes; the same on every rank."""
    sizes = np.array([unit.size(lora_rank) for unit in units], dtype=np.float64)
    middle = np.cumsum(sizes) - sizes / 2
    return np.minimum((middle / sizes.sum() * ranks).astype(np.int64), ranks - 1)


def group_layouts(trainers: Sequence[Trainer]) -> list[GroupLayout]:
    """Give each group consecutive ranks, in the order of the config."""
    layouts, first = [], 0
    for trainer in trainers:
        layouts.append(GroupLayout(first, trainer.ranks, trainer.expert_parallel))
        first += trainer.ranks
    return layouts
