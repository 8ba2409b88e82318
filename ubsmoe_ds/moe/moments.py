"""The moments that `linearised` pseudo-gradients are computed from: summed in local steps, replaced between rounds.

Shapes: L layers, E experts, F expert width, X = 3 F + 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import Moments


class ExpertMoments:
    """The moments of one rank's experts.

    All replicas of an expert use the same moments for a whole round, so that they stay equal.

    Args:
        layers: the model's UB-SMoE layers, in order.
        share: the approximate share of the experts' rows that is looked at.
    """

    def __init__(self, layers: Sequence[UBSMoE], share: float = 1.0) -> None:
        self.layers, self.every = layers, round(1 / share)
        experts, device = layers[0].experts, layers[0].experts.factors()["gate"][0].device
        self._local = slice(experts.first, experts.first + experts.num_local_experts)
        # the experts hold parts of two tensors, so that all layers are read, started anew and updated at once
        self._sums_LEX = torch.zeros(len(layers), experts.num_local_experts, 3 * experts.hidden + 1, device=device)
        # zero: no pseudo-gradient before there are moments
        self._moments_3LEF = torch.zeros(3, len(layers), experts.num_local_experts, experts.hidden, device=device)
        for layer, *moments in zip(layers, *self._moments_3LEF, strict=True):
            layer.experts.moments = Moments(*moments)
        self.sample(self.every)

    def sample(self, every: int) -> None:
        """Look at a sample of 1 / every of the rows from now on."""
        for layer, sums_EX in zip(self.layers, self._sums_LEX, strict=True):
            layer.experts.moment_every, layer.experts.moment_sums_EX = every, sums_EX

    def start(self) -> None:
        """Start new sums."""
        self._sums_LEX.zero_()

    def sums(self) -> Tensor:
        """Return the sums over the rows looked at on this rank, and in the last column their number.

        Returns:
            [L, E, 3 F + 1] fp64 on the CPU; only the sum over the ranks of a client has a meaning.
        """
        local_LEX, layer = self._sums_LEX.double().cpu(), self.layers[0]
        if layer.num_local_experts == layer.num_experts:
            return local_LEX
        sums_LEX = local_LEX.new_zeros(len(self.layers), layer.num_experts, local_LEX.shape[2])
        sums_LEX[:, self._local] = local_LEX
        return sums_LEX

    def update(self, total_LEX: Tensor) -> None:
        """Set the moments to the means of these sums; experts that were never active keep theirs.

        Args:
            total_LEX: like `sums`, summed over all ranks, weighted or not.
        """
        local_LEX, device = total_LEX[:, self._local], self._sums_LEX.device
        count_LE1 = local_LEX[..., -1:]
        mean_LEX = local_LEX[..., :-1] / count_LE1.clamp_min(torch.finfo(torch.float64).tiny)
        new_3LEF = torch.stack(mean_LEX.float().chunk(3, dim=-1)).to(device)
        self._moments_3LEF.copy_(torch.where((count_LE1 > 0).to(device), new_3LEF, self._moments_3LEF))
