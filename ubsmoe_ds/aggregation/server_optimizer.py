"""Apply server optimisers (FedOpt, arXiv 2003.00295) to merged updates. An owner keeps the state of the units it owns.

Shapes: N elements.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ubsmoe_ds.config.sections import MergeConfig


class ServerOptimizer:
    """The server optimiser of one segment. The merged update d stands for the server's negative gradient.

    momentum: m <- b1 m + d; the step is lr m.
    adam: m <- b1 m + (1 - b1) d, v <- b2 v + (1 - b2) d^2; the step is lr m / (sqrt(v) + eps), without bias correction.
    """

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """Return the moments, [N] each; none before the first step."""
        return {} if self.first is None or self.second is None else {"first": self.first, "second": self.second}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore moments that `state` returned."""
        self.first, self.second = state.get("first"), state.get("second")

    def step(self, delta_N: Tensor, sent_N: Tensor) -> Tensor:
        """Return the update to apply, [N]. Moments of elements that no client sent stay as they are.

        Args:
            delta_N: merged update.
            sent_N: which elements some client sent; [N] or [1].
        """
        if self.config.server_optimizer == "none":
            return delta_N
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(delta_N), torch.zeros_like(delta_N)
        beta1, beta2 = self.config.server_betas
        if self.config.server_optimizer == "momentum":
            self.first = torch.where(sent_N, beta1 * self.first + delta_N, self.first)
            return self.config.server_lr * self.first
        self.first = torch.where(sent_N, beta1 * self.first + (1 - beta1) * delta_N, self.first)
        self.second = torch.where(sent_N, beta2 * self.second + (1 - beta2) * delta_N.square(), self.second)
        return self.config.server_lr * self.first / (self.second.sqrt() + self.config.server_eps)
