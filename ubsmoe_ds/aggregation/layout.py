"""Which module states are exchanged (units), which ranks hold them, and which rank owns each.

Shapes: C clients, U units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ubsmoe_ds.config.experiment import Experiment


@dataclass(frozen=True)
class Unit:
    """A module's state: `numel` elements, or LoRA factors A [R, n] and B [m, R] of `lora` = (m, n).

    `expert` is the expert it belongs to, or None for state that every rank of a client holds; `layer` its
    layer among those with experts.
    """

    name: str
    numel: int = 0
    expert: int | None = None
    lora: tuple[int, int] | None = None
    layer: int = 0

    def size(self, rank: int) -> int:
        """Elements of the unit at a LoRA rank."""
        return self.numel if self.lora is None else rank * sum(self.lora)


@dataclass(frozen=True)
class ClientLayout:
    """Which ranks of the job a client has, how its experts are spread over them (DeepSpeed's order), its LoRA ranks.

    lora_rank: of what it sends; reply_rank: of what it gets back, None: the same.
    """

    first: int
    ranks: int
    expert_parallel: int
    lora_rank: int = 0
    reply_rank: int | None = None

    def holders(self, unit: Unit, num_experts: int) -> range:
        """Job ranks that hold the unit: all of the client, or those of its expert's place in each expert group."""
        if unit.expert is None:
            return range(self.first, self.first + self.ranks)
        place = unit.expert // (num_experts // self.expert_parallel)
        return range(self.first + place, self.first + self.ranks, self.expert_parallel)

    def sizes(self, units: Sequence[Unit], reply: bool) -> np.ndarray:
        """Elements of each unit on the way to the owner, or back."""
        rank = self.reply_rank if reply and self.reply_rank is not None else self.lora_rank
        return np.array([unit.size(rank) for unit in units], dtype=np.int64)


def owners(units: Sequence[Unit], lora_rank: int, ranks: int) -> np.ndarray:
    """Owner of each unit: contiguous blocks of units with about equal bytes; the same on every rank."""
    sizes = np.array([unit.size(lora_rank) for unit in units], dtype=np.float64)
    middle = np.cumsum(sizes) - sizes / 2
    return np.minimum((middle / sizes.sum() * ranks).astype(np.int64), ranks - 1)


def client_layouts(exp: Experiment) -> list[ClientLayout]:
    """Consecutive ranks for each client, in the order of the config."""
    layouts, first = [], 0
    for client in exp.clients:
        layouts.append(ClientLayout(first, client.ranks, client.expert_parallel))
        first += client.ranks
    return layouts
