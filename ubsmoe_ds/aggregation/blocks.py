"""Say where parameters lie in a held buffer: blocks of units side by side, at any LoRA rank.

Shapes: m x n a projection's weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Block:
    """Consecutive units of one kind: named parameters whose rows side by side are the `rows` units.

    A LoRA block has A, stacked or not, then B; `shape` is that of the frozen weight they adapt, and `base` this weight,
    unless it is quantised. Its units hold the first LoRA ranks of both. `group` is set where other ranks hold other
    rows; `first` is the number of the first row here.
    """

    parameters: dict[str, nn.Parameter]
    rows: int
    shape: tuple[int, ...] | None = None
    base: Tensor | None = None
    group: ProcessGroup | None = None
    first: int = 0

    @property
    def name(self) -> str:
        """Return the name of its first parameter."""
        return next(iter(self.parameters))

    @property
    def holders(self) -> int:
        """Return how many ranks of the client hold one copy of all rows together."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def numel(self, lora_rank: int) -> int:
        """Return its elements in the held buffer."""
        if self.shape is None:
            return sum(p.numel() for p in self.parameters.values())
        return self.rows * lora_rank * sum(self.shape[-2:])

    def join(self, values: Sequence[Tensor], lora_rank: int) -> Tensor:
        """Lay values of the parameters' shapes out as in the held buffer."""
        if self.shape is not None:
            values = [values[0][..., :lora_rank, :], values[1][..., :lora_rank]]
        return torch.cat([value.reshape(self.rows, -1) for value in values], dim=1).reshape(-1)

    def split(self, flat: Tensor, lora_rank: int) -> dict[str, Tensor]:
        """Return the values of each parameter, LoRA factors at the buffer's LoRA rank; the inverse of `join`."""
        shapes = [p.shape for p in self.parameters.values()]
        if self.shape is not None:
            A_shape, B_shape = shapes
            shapes = [torch.Size([*A_shape[:-2], lora_rank, A_shape[-1]]), torch.Size([*B_shape[:-1], lora_rank])]
        columns = [shape.numel() // self.rows for shape in shapes]
        values = flat.view(self.rows, -1).split(columns, dim=1)
        return {n: v.reshape(shape) for n, v, shape in zip(self.parameters, values, shapes, strict=True)}


class Place(NamedTuple):
    """Where the values of one parameter lie in a held buffer, LoRA factors at the buffer's LoRA rank."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the values as a view of a buffer."""
        return flat.as_strided(self.shape, self.strides, self.start)

    def part(self, whole: Tensor) -> Tensor:
        """Return of a tensor of the parameter's shape what the buffer holds."""
        return whole if whole.shape == self.shape else whole[..., : self.shape[-2], : self.shape[-1]]


class Places(NamedTuple):
    """Where all parameters lie in a held buffer of one LoRA rank.

    numel: elements of the buffer.
    live: of each parameter the part that the buffer holds, itself, as nothing gives parameters other memory; None where
        masters are others than the parameters.
    cut: parameters of which the buffer holds a part only, where `live` is set.
    """

    every: list[Place]
    numel: int
    live: list[Tensor] | None
    cut: list[Tensor]
