"""Turn a flat buffer of a rank's units (see aggregation/units.py) into pieces, and read it in any layout."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.checkpoint.storage import Piece, Reader


def held_parts(
    kind: str, owner: str, held: Tensor, store: UnitStore, lora_rank: int, group_rank: int
) -> Iterator[tuple[Piece, bool]]:
    """Yield the pieces of a buffer, and whether this rank writes each: the first of its group that hold a block do.

    Args:
        kind, owner: of the pieces.
        held: the buffer.
        store: this rank's store.
        lora_rank: of the buffer.
        group_rank: this rank in its group.
    """
    for block, value in store.parts(held, lora_rank):
        yield (
            Piece(kind, owner, block.name, block.first * (len(value) // block.rows), value),
            group_rank < block.holders,
        )


def held_pieces(
    kind: str, owner: str, held: Tensor, store: UnitStore, lora_rank: int, group_rank: int
) -> Iterator[Piece]:
    """Yield the pieces of a buffer that this rank writes, see `held_parts`."""
    return (piece for piece, own in held_parts(kind, owner, held, store, lora_rank, group_rank) if own)


def read_held(kind: str, owner: str, reader: Reader, store: UnitStore, lora_rank: int) -> Tensor:
    """Return a buffer of the units that this rank holds.

    Raises:
        UserError: if the checkpoint lacks some of it.
    """
    parts = []
    for block in store.blocks:
        numel = block.numel(lora_rank)
        parts.append(reader.read(kind, owner, block.name, block.first * (numel // block.rows), numel))
    return torch.cat(parts)
