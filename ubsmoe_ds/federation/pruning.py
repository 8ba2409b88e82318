"""HetLoRA's rank self-pruning (arXiv 2401.06432): a client gives up the ranks that its local steps have let shrink."""

import torch
from torch import Tensor
from torch import distributed as dist

from ubsmoe_ds.federation.units import UnitStore


def next_rank(store: UnitStore, update: Tensor, tail_start: int) -> int:
    """The client's rank for the next round (a collective over the client).

    The tail, all ranks from `tail_start` on, is given up if its norm, sum ||B[:, tail]|| ||A[tail, :]|| over the
    modules, shrank during the round. What it has learned still counts in this round's merge [ours].

    Args:
        store: of this rank.
        update: what local steps changed; see `UnitStore.updates`.
        tail_start: see `Client.tail_start`.
    """
    if tail_start >= store.rank:
        return store.rank
    shared, current = store.shared, store.shared + update
    norms = torch.tensor([store.tail_norm(flat, tail_start) for flat in (shared, current)], dtype=torch.float64)
    norms = norms.to(next(store.model.parameters()).device)
    dist.all_reduce(norms)
    before, after = norms.tolist()
    return tail_start if after < before else store.rank
