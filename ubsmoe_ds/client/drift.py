"""Correct the gradients of a client's local steps, so that the client does not drift away from the others.

FedProx (arXiv 1812.06127, eq. 2) minimises f_i(w) + mu / 2 ||w - w_t||^2, where w_t is what the local steps of a round
begin with. So the gradient of a step gets mu (w - w_t). SCAFFOLD (arXiv 1910.06378, algorithm 1) adds c - c_i to it,
see aggregation/controls.py.

Both are added after clipping [ours]: the papers do not clip, and here neither depends on how large the loss's own
gradient is, in any ZeRO stage.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ubsmoe_ds.client.gradients import Fragment


class DriftCorrection:
    """Adds FedProx's and SCAFFOLD's terms to the fp32 gradients at an optimiser's masters, in all forms of these.

    buffers: by name and master a tensor of the master's shape beside it: "anchor" is w_t; "shift" is c - c_i, which the
    caller sets; "sum" is the sum over the round's steps of the gradients to which c - c_i is added. A checkpoint within
    a round holds them as it holds moments.

    Args:
        optimizer: the base optimiser; its parameters are the masters.
        mu: weight of FedProx's term; 0: none.
        scaffold: whether to have SCAFFOLD's.
        own: masters' elements that stay with the client, the learned scales of its gates: they are not pulled to w_t.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mu: float, scaffold: bool, own: Sequence[Fragment]) -> None:
        self.mu, self.scaffold, self._own = mu, scaffold, own
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        self.buffers: dict[str, dict[Tensor, Tensor]] = {}
        if mu:
            self.buffers["anchor"] = {master: master.detach().clone() for master in masters}
        for name in ("sum", "shift") if scaffold else ():
            self.buffers[name] = {master: torch.zeros_like(master, requires_grad=False) for master in masters}

    @torch.no_grad()
    def begin_round(self) -> None:
        """Take the masters as they are now for w_t, and begin a new sum."""
        if self.mu:
            anchors = self.buffers["anchor"]
            torch._foreach_copy_(list(anchors.values()), list(anchors))
        if self.scaffold:
            torch._foreach_zero_(list(self.buffers["sum"].values()))

    @torch.no_grad()
    def correct(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the gradients of an optimiser's step about to be taken; a master without gradient is left alone.

        Args:
            optimizer: the base optimiser; under ZeRO with one of its parameter groups at a time.
        """
        masters = [master for group in optimizer.param_groups for master in group["params"] if master.grad is not None]
        gradients = [master.grad for master in masters]
        if self.mu:  # g <- g + mu (w - w_t)
            torch._foreach_add_(gradients, self._pulls(masters), alpha=self.mu)
        if self.scaffold:  # g <- g - c_i + c
            torch._foreach_add_(self._of("sum", masters), gradients)
            torch._foreach_add_(gradients, self._of("shift", masters))

    def _pulls(self, masters: list[Tensor]) -> list[Tensor]:
        """Return w - w_t of some masters, zero for what stays with the client."""
        pulls = list(torch._foreach_sub(masters, self._of("anchor", masters)))
        by_master = dict(zip(masters, pulls, strict=True))
        for master, start, _, numel in self._own:
            if master in by_master:
                by_master[master].view(-1)[start : start + numel] = 0
        return pulls

    def _of(self, name: str, masters: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers of some masters."""
        return [self.buffers[name][master] for master in masters]
