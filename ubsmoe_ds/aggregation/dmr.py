"""Turn global expert utilisation into phi, the modulation of routing logits: the server step of DMR.

Shapes: L layers (or none), E experts. DMR = Dynamic Modulated Routing.
Source: UB-SMoE, arXiv 2605.16690 [paper]; lines marked [ours] are our reading.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_utilisation(weights: Sequence[float], active: Sequence[int], num_experts: int) -> float:
    """Return u* = (sum_c w_c K_c) / M, each expert's utilisation if all were used equally [paper].

    Args:
        weights: data weights w_c, summing to one.
        active: K_c, active experts per token of each client.
        num_experts: M.

    Returns:
        u*, in tokens routed to an expert per token.
    """
    return sum(w * k for w, k in zip(weights, active, strict=True)) / num_experts


def server_step(phi_mean_E: Tensor, utilisation_E: Tensor, target: float, zeta: float, eps: float) -> Tensor:
    """Return zeta * phibar + (1 - zeta) * tanh(u* / (u + eps) - 1) [paper; phibar as weighted client mean: ours].

    Args:
        phi_mean_E: phibar, the data-weighted mean of the clients' phi, fp32, [..., E].
        utilisation_E: u = sum_c w_c a_c / n_c, tokens routed to an expert per token, [..., E].
        target: u*, see `target_utilisation`.
        zeta: server momentum in [0, 1].
        eps: keeps the quotient of an unused expert finite; it gets tanh(large) = 1, the strongest pull.

    Returns:
        The next phi, [..., E]: towards +1 for experts used too little, towards -tanh(1) for those used too much.
    """
    return zeta * phi_mean_E + (1.0 - zeta) * torch.tanh(target / (utilisation_E + eps) - 1.0)


def coefficient_of_variation(utilisation_E: Tensor) -> Tensor:
    """Return standard deviation over mean of the experts' utilisation, [...]; 0 means perfectly even use."""
    return utilisation_E.std(dim=-1, unbiased=False) / utilisation_E.mean(dim=-1).clamp_min(
        torch.finfo(torch.float32).tiny
    )
