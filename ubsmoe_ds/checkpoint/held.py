"""Turn a flat buffer of a rank's units (see aggregation/units.py) into pieces, and read it in any layout."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.checkpoint.storage import Piece, Reader


def held_pieces(
    kind: str, owner: str, held: Tensor, store: UnitStore, lora_rank: int, group_rank: int
) -> Iterator[Piece]:
    """Yield this rank's part of a buffer; the first ranks of the group that hold a block write it.

    Args:
        kind, owner: of the pieces.
        held: the buffer.
        store: this rank's store.
        lora_rank: of the buffer.
        group_rank: this rank in its group.
    """
    for block, value in store.parts(held, lora_rank):
        if group_rank < block.holders:
            yield Piece(kind, owner, block.name, block.first * (len(value) // block.rows), value)


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


def has_held(kind: str, owner: str, reader: Reader, store: UnitStore) -> bool:
    """Return whether there is such a buffer."""
    return reader.has(kind, owner, store.blocks[0].name)
