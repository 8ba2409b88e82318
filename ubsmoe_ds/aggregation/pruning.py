"""HetLoRA's self-pruning (arXiv 2401.06432): give up the LoRA ranks that local steps have let shrink."""

import torch
from torch import Tensor
from torch import distributed as dist

from ubsmoe_ds.aggregation.units import UnitStore


def next_rank(store: UnitStore, update: Tensor, lora_rank: int, tail_start: int) -> int:
    """Return the client's LoRA rank for the next round (a collective over the client).

    The tail, all LoRA ranks from `tail_start` on, is given up if its norm shrank during the round; see `tail_norm`. Its
    update still counts in this round's merge [ours].

    Args:
        store: units of this rank.
        update: what the client has changed; see `UnitStore.updates`.
        lora_rank: the client's LoRA rank in this round.
        tail_start: see `tail_start` in client/engine.py.
    """
    if tail_start >= lora_rank:
        return lora_rank
    loaded, current = store.loaded, store.loaded + update
    norms = torch.tensor(
        [tail_norm(store, flat, lora_rank, tail_start) for flat in (loaded, current)], dtype=torch.float64
    )
    norms = norms.to(next(store.model.parameters()).device)
    dist.all_reduce(norms)
    before, after = norms.tolist()
    return tail_start if after < before else lora_rank


def tail_norm(store: UnitStore, flat: Tensor, lora_rank: int, first: int) -> float:
    """Sum ||B[:, first:]|| ||A[first:, :]|| over this rank's units.

    Divided by the number of copies, so that the sum over ranks counts each expert and attention module once.

    Args:
        store: units of this rank.
        flat: values of the held units.
        lora_rank: LoRA rank of `flat`.
        first: the first LoRA rank of the tail.
    """
    total, ranks = 0.0, dist.get_world_size()
    for block, part in store.parts(flat, lora_rank):
        if block.shape is None:
            continue
        A, B = block.split(part, lora_rank).values()
        norm = B[..., first:].norm(dim=(-2, -1)) * A[..., first:, :].norm(dim=(-2, -1))
        total += float(norm.sum()) / (ranks // block.holders)
    return total
