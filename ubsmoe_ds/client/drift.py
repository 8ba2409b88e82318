"""Correct the gradients of a client's local steps, so that the client does not drift away from the others.

FedProx (arXiv 1812.06127, eq. 2) minimises f_c(w) + mu / 2 ||w - w_t||^2, where w_t is what the local steps of a round
begin with. So the gradient of a step gets mu (w - w_t). This is added after clipping [ours]: the paper does not clip,
and here the pull towards w_t does not depend on how large the loss's own gradient is, in any ZeRO stage.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ubsmoe_ds.client.gradients import Fragment


class DriftCorrection:
    """Adds FedProx's term to the fp32 gradients at an optimiser's masters, in whichever form DeepSpeed keeps these.

    Its buffers lie on the masters' device, one tensor of the master's shape for each.

    Args:
        optimizer: the base optimiser; its parameters are the masters.
        mu: weight of FedProx's term.
        own: masters' elements that stay with the client, and so are not pulled: the learned scales of its gates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mu: float, own: Sequence[Fragment]) -> None:
        self.mu, self._own = mu, own
        self._masters: list[Tensor] = [master for group in optimizer.param_groups for master in group["params"]]
        # by name and master; a checkpoint within a round holds them like the optimiser's moments
        self.buffers = {"anchor": {master: master.detach().clone() for master in self._masters}}

    @torch.no_grad()
    def begin_round(self) -> None:
        """Take the masters as they are now for w_t."""
        torch._foreach_copy_(list(self.buffers["anchor"].values()), self._masters)

    @torch.no_grad()
    def correct(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the gradients of an optimiser's step about to be taken; a master without gradient is left alone.

        Args:
            optimizer: the base optimiser; under ZeRO with one of its parameter groups at a time.
        """
        masters = [master for group in optimizer.param_groups for master in group["params"] if master.grad is not None]
        gradients = [master.grad for master in masters]
        # g <- g + mu (w - w_t)
        pull = dict(zip(masters, torch._foreach_sub(masters, self._of("anchor", masters)), strict=True))
        for master, start, _, numel in self._own:
            if master in pull:
                pull[master].view(-1)[start : start + numel] = 0
        torch._foreach_add_(gradients, list(pull.values()), alpha=self.mu)

    def _of(self, name: str, masters: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers of some masters."""
        return [self.buffers[name][master] for master in masters]
