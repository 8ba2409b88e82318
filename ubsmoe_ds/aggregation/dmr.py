"""DMR's server step: global expert utilisation becomes a modulation of the routing logits.

Shapes: L layers (or none), E experts. Source: UB-SMoE, arXiv 2605.16690 [paper]; lines marked [ours] are our reading.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_utilisation(weights: Sequence[float], active: Sequence[int], num_experts: int) -> float:
    """u* = (sum_c w_c K_c) / M, the utilisation of every expert if all were used alike [paper].

    Args:
        weights: data weights w_c, summing to one.
        active: K_c of each client.
        num_experts: M.

    Returns:
        u*, in active experts per token and expert.
    """
    return sum(w * k for w, k in zip(weights, active, strict=True)) / num_experts


def server_step(phi_mean_E: Tensor, utilisation_E: Tensor, target: float, zeta: float, eps: float) -> Tensor:
    """phi <- zeta * phibar + (1 - zeta) * tanh(u* / (u + eps) - 1) [paper; phibar as weighted client mean: ours].

    Args:
        phi_mean_E: phibar, the data-weighted mean of the clients' phi, fp32, [..., E].
        utilisation_E: u = sum_c w_c a_c / n_c, tokens routed to an expert per token, [..., E].
        target: u*, see `target_utilisation`.
        zeta: server momentum in [0, 1].
        eps: keeps an unused expert finite; it gets tanh(large) = 1, the strongest pull.

    Returns:
        The next phi, [..., E]: towards +1 for experts used too little, towards -tanh(1) for those used too much.
    """
    return zeta * phi_mean_E + (1.0 - zeta) * torch.tanh(target / (utilisation_E + eps) - 1.0)


def coefficient_of_variation(utilisation_E: Tensor) -> Tensor:
    """Standard deviation over mean of the experts' utilisation, [...]; 0 is a perfectly even use."""
    return utilisation_E.std(dim=-1, unbiased=False) / utilisation_E.mean(dim=-1).clamp_min(
        torch.finfo(torch.float32).tiny
    )
