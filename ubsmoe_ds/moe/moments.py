"""The moments that `linearised` pseudo-gradients stand on: summed up during local steps, replaced between rounds.

Shapes: L layers, E experts, F expert width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import Moments


class ExpertMoments:
    """Of one rank's experts. All replicas of an expert use the same moments for a whole round, so that they stay equal.

    Args:
        layers: the model's UB-SMoE layers, in order.
    """

    def __init__(self, layers: Sequence[UBSMoE]) -> None:
        self.layers = layers
        self.start()
        for layer in layers:
            layer.experts.moments = layer.experts.moment_sums  # zero: no pseudo-gradient before there are moments

    def start(self) -> None:
        """Begin to sum up anew; the gates' counts must be reset with it."""
        for layer in self.layers:
            layer.experts.start_moments()

    def sums(self) -> Tensor:
        """Sums of this rank's experts, and in the last column the routes of its own tokens to each expert.

        Returns:
            [L, E, 3 F + 1] fp64 on the CPU; only the sum over the ranks of a client has a meaning.
        """
        found = []
        for layer in self.layers:
            experts = layer.experts
            assert experts.moment_sums is not None
            own_EX = torch.cat([part.double().cpu() for part in experts.moment_sums], dim=1)
            sums_EX = own_EX.new_zeros(layer.num_experts, own_EX.shape[1] + 1)
            sums_EX[experts.first : experts.first + len(own_EX), :-1] = own_EX
            sums_EX[:, -1] = layer.gate.kept_E.double().cpu()
            found.append(sums_EX)
        return torch.stack(found)

    def update(self, total_LEX: Tensor) -> None:
        """Take the means of the experts that were active at all; the others keep theirs.

        Args:
            total_LEX: like `sums`, of all ranks together, weighted or not.
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
