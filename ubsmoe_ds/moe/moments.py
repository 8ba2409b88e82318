"""The moments that `linearised` pseudo-gradients are computed from: summed in local steps, replaced between rounds.

Shapes: L layers, E experts, F expert width.
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
        self.start()
        for layer in layers:
            experts = layer.experts
            zero_EF = torch.zeros(experts.num_local_experts, experts.hidden, device=experts.factors()["gate"][0].device)
            experts.moments = Moments(zero_EF, zero_EF, zero_EF)  # no pseudo-gradient before there are moments

    def start(self, every: int | None = None) -> None:
        """Start new sums.

        Args:
            every: look at a sample of 1 / every of the rows; None: at `share` of them.
        """
        for layer in self.layers:
            layer.experts.start_moments(every or self.every)

    def sums(self) -> Tensor:
        """Return the sums over the rows looked at on this rank, and in the last column their number.

        Returns:
            [L, E, 3 F + 1] fp64 on the CPU; only the sum over the ranks of a client has a meaning.
        """
        sums = []
        for layer in self.layers:
            experts = layer.experts
            assert experts.moment_sums_EX is not None
            local_EX = experts.moment_sums_EX.double().cpu()
            if layer.num_local_experts == layer.num_experts:
                sums.append(local_EX)
                continue
            sums_EX = local_EX.new_zeros(layer.num_experts, local_EX.shape[1])
            sums_EX[experts.first : experts.first + len(local_EX)] = local_EX
            sums.append(sums_EX)
        return torch.stack(sums)

    def update(self, total_LEX: Tensor) -> None:
        """Set the moments to the means of these sums; experts that were never active keep theirs.

        Args:
            total_LEX: like `sums`, summed over all ranks, weighted or not.
        """
        for layer, total_EX in zip(self.layers, total_LEX, strict=True):
            experts = layer.experts
            assert experts.moments is not None
            local_EX = total_EX[experts.first : experts.first + layer.num_local_experts]
            count_E1 = local_EX[:, -1:]
            mean_EX = local_EX[:, :-1] / count_E1.clamp_min(torch.finfo(torch.float64).tiny)
            device = experts.moments.hidden_EF.device
            used_E1, new = (count_E1 > 0).to(device), mean_EX.float().to(device).chunk(3, dim=1)
            experts.moments = Moments(
                *(torch.where(used_E1, value, old) for value, old in zip(new, experts.moments, strict=True))
            )
