"""Server optimisers (FedOpt, arXiv 2003.00295) on merged updates; an owner keeps the state of its own units.

Shapes: N elements.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ubsmoe_ds.config.sections import MergeConfig


class ServerOptimizer:
    """FedOpt (arXiv 2003.00295) on one segment: the merged update is the server's negative gradient.

    momentum: m = b1 m + d;  step lr m        adam: m = b1 m + (1 - b1) d, v = b2 v + (1 - b2) d^2;
                                                    step lr m / (sqrt(v) + eps), without bias correction
    """

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The moments, if there are any yet, [N] each."""
        return {} if self.first is None or self.second is None else {"first": self.first, "second": self.second}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` once gave."""
        self.first, self.second = state.get("first"), state.get("second")

    def step(self, delta_N: Tensor, heard_N: Tensor) -> Tensor:
        """The update to apply; moments of elements that nobody sent stay as they are.

        Args:
            delta_N: merged update.
            heard_N: which elements some client sent; [N] or [1].
        """
        if self.config.server_optimizer == "none":
            return delta_N
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(delta_N), torch.zeros_like(delta_N)
        beta1, beta2 = self.config.server_betas
        if self.config.server_optimizer == "momentum":
            self.first = torch.where(heard_N, beta1 * self.first + delta_N, self.first)
            return self.config.server_lr * self.first
        self.first = torch.where(heard_N, beta1 * self.first + (1 - beta1) * delta_N, self.first)
        self.second = torch.where(heard_N, beta2 * self.second + (1 - beta2) * delta_N.square(), self.second)
        return self.config.server_lr * self.first / (self.second.sqrt() + self.config.server_eps)
