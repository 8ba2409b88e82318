"""SCAFFOLD's control variates (arXiv 1910.06378, algorithm 1): c of the population, and c_i of each client i.

A local step has g <- g - c_i + c. Of the two ways to renew c_i after the K steps of a round, option II is

    c_i+ = c_i - c + (x - y) / (K eta)

where x is what the steps began with, y what they led to, and eta the learning rate. For plain SGD this is the mean over
the steps of the gradients before the correction. That mean is what c_i+ is here [ours], so that it has a meaning under
every optimiser: of gradients as the optimiser gets them, clipped, with PG and with FedProx's term. After the merge

    c <- c + (1 / N) sum over the round's clients of (c_i+ - c_i)

with N clients in the population. Both begin at zero. A client that sits the round out, sends NaN or Inf or is left out
by screening changes neither c nor its c_i.

c, c_i and their changes are flat fp32 buffers on the CPU of the units that this rank holds, like `UnitStore.shared`.
All clients have the same LoRA rank, so no buffer has to be cut or widened.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.exchange import Exchange
from ubsmoe_ds.aggregation.host_copies import to_device, to_host
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.client.drift import DriftCorrection


class ControlChange(NamedTuple):
    """Hold what a merge changes: c, and c_i of those clients of the round that this rank's group has trained."""

    common: Tensor
    own: Mapping[int, Tensor]


class Controls:
    """c for the units that this rank holds, and the arithmetic of c_i, which the caller keeps for each client.

    Args:
        store: the units.
        drift: corrects the gradients of local steps, and sums them.
        lora_rank: of all clients' buffers.
        clients: N.
    """

    def __init__(self, store: UnitStore, drift: DriftCorrection, lora_rank: int, clients: int) -> None:
        self.store, self.drift, self.lora_rank, self.clients = store, drift, lora_rank, clients
        self.common = torch.zeros_like(store.shared)

    def begin_round(self, own: Tensor | None) -> None:
        """Let the local steps of a client be corrected by c - c_i.

        Args:
            own: c_i; None: it is zero.
        """
        shift = self.common if own is None else self.common - own
        buffers = self.drift.buffers["shift"]
        on_device = to_device(shift, next(iter(buffers)).device)
        for block, part in self.store.parts(on_device, self.lora_rank):
            for name, value in block.split(part, self.lora_rank).items():
                self.store.masters.write_beside(block.parameters[name], buffers, value)

    def change_of(self, own: Tensor | None, steps: int) -> Tensor:
        """Return c_i+ - c_i of a client after its local steps (a collective over the group under ZeRO).

        Args:
            own: c_i; None: it is zero.
            steps: that it has taken in the round; 0: nothing changes.
        """
        if steps == 0:
            return torch.zeros_like(self.common)
        read, sums = self.store.masters.read_beside, self.drift.buffers["sum"]
        values = [
            block.join([read(parameter, sums) for parameter in block.parameters.values()], self.lora_rank)
            for block in self.store.blocks
        ]
        mean = to_host(torch.cat(values) / steps)
        return mean if own is None else mean - own

    def merge(self, own: Mapping[int, Tensor], exchange: Exchange) -> ControlChange:
        """Return what a round changes, here and on all other ranks (a collective); change nothing.

        Args:
            own: c_i+ - c_i of the clients that this group has trained, and that count.
            exchange: moves units between ranks.
        """
        held = torch.zeros_like(self.common)
        for change in own.values():
            held += change
        return ControlChange(torch.from_numpy(exchange.total(held.numpy())) / self.clients, own)

    def apply(self, change: ControlChange) -> None:
        """Renew c for good."""
        self.common += change.common
