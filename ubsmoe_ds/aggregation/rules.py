"""Merge rules: pure functions on the stacked updates or LoRA factors of the clients. No job ranks, files or MPI here.

Elementwise rules take updates (local minus shared) of one LoRA rank. Factor rules take the LoRA factors of clients of
any LoRA ranks, all units of one shape at a time. Updates and factors are finite. Weights are per client and element or
unit, on any scale. A client of weight zero does not count. Where all weights are zero nothing is learned: the update,
or Delta W, is zero.

Shapes: C clients, N elements, U units of one shape (such as a layer's experts), m x n a unit's Delta W, R LoRA rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.client.finite import all_finite


class Factors(NamedTuple):
    """LoRA factors of U units: Delta W = B A, alpha / r already multiplied into B.

    A_URn: [U, R, n]; B_UmR: [U, m, R]
    """

    A_URn: Tensor
    B_UmR: Tensor


def shares(weight_C: Tensor) -> Tensor:
    """Return the weights divided by their sum over clients (dim 0), in fp64; zero where all are zero.

    Raises:
        ValueError: if a weight is negative or not finite.
    """
    wide_C = weight_C.double()
    total = wide_C.sum(dim=0, keepdim=True)
    if not all_finite(wide_C) or bool((wide_C < 0).any()):
        raise ValueError(f"client weights must be finite and not negative, got {weight_C.tolist()}")
    return wide_C / total.clamp_min(torch.finfo(torch.float64).tiny)


def fedavg(update_CN: Tensor, weight_CN: Tensor) -> Tensor:
    """Return the weighted mean of the clients' updates (FedAvg, arXiv 1602.05629; UB-SMoE's own rule).

    Args:
        update_CN: client updates, floating point.
        weight_CN: weights, [C, N], or [C, 1] if all elements have the same.

    Returns:
        The mean, [N], in the dtype of `update_CN`, summed in fp32 or wider.
    """
    wide = torch.promote_types(update_CN.dtype, torch.float32)
    share_CN = shares(weight_CN).to(wide)
    if share_CN.shape[1] == 1:  # one matrix-vector product
        return (share_CN[:, 0] @ update_CN.to(wide)).to(update_CN.dtype)
    return torch.einsum("cn,cn->n", share_CN, update_CN.to(wide)).to(update_CN.dtype)


def activation_weight(weight_C: Tensor, used_CU: Tensor, temperature: float) -> Tensor:
    """Weigh clients by how much they used an expert: n_c f^t (FLAME, arXiv 2506.16600; our stand-in for A3SMoE).

    Args:
        weight_C: n_c, the data weights.
        used_CU: f, the share of a client's tokens that used each unit's expert.
        temperature: t; at 0 the rule is FedAvg over the clients that used the expert at all [ours: 0^0 is 0].

    Returns:
        Weights [C, U] for `fedavg`; zero for a client that did not use the expert.
    """
    return torch.where(used_CU > 0, weight_C.unsqueeze(1) * used_CU.clamp_min(1e-30).pow(temperature), 0.0)


def coordinate_median(update_CN: Tensor, weight_CN: Tensor) -> Tensor:
    """Return the median of each element over the clients that count (arXiv 1803.01498); their weights do not matter."""
    sorted_CN, count_1N = _sorted_valid(update_CN, weight_CN)
    # of n sorted values the two in the middle, (n - 1) // 2 and n // 2: the same one if n is odd
    low, high = (count_1N - 1).clamp_min(0) // 2, count_1N // 2
    high = torch.minimum(high, (count_1N - 1).clamp_min(0))  # keeps n = 0 in range
    # their mean; zero where no client counts
    middle = (sorted_CN.gather(0, low) + sorted_CN.gather(0, high)) / 2
    return torch.where(count_1N > 0, middle, 0.0).squeeze(0).to(update_CN.dtype)


def trimmed_mean(update_CN: Tensor, weight_CN: Tensor, trim: float) -> Tensor:
    """Return the mean of each element without its floor(trim * n) largest and smallest values (arXiv 1803.01498).

    n is the number of clients that count for the element; their weights do not matter further.
    """
    sorted_CN, count_1N = _sorted_valid(update_CN, weight_CN)
    # floor(trim * n); 1e-9 because a product just below a whole number stands for that number
    cut_1N = (count_1N.double() * trim + 1e-9).long()
    # keep the sorted places from cut to n - cut; clients that do not count lie beyond n
    place_C1 = torch.arange(len(update_CN), device=update_CN.device).unsqueeze(1)
    kept_CN = (place_C1 >= cut_1N) & (place_C1 < count_1N - cut_1N)
    # mean over the kept values; 0 / 1 where none is kept
    total = torch.where(kept_CN, sorted_CN, 0.0).sum(dim=0)
    return (total / kept_CN.sum(dim=0).clamp_min(1)).to(update_CN.dtype)


def _sorted_valid(update_CN: Tensor, weight_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values in rising order, those that do not count last as inf, and how many count, [1, N]."""
    valid_CN = (shares(weight_CN) > 0).expand(update_CN.shape)
    wide = torch.promote_types(update_CN.dtype, torch.float32)
    return torch.where(valid_CN, update_CN.to(wide), torch.inf).sort(dim=0).values, valid_CN.sum(dim=0, keepdim=True)


def clip_factors(norm_CU: Tensor, largest: float) -> Tensor:
    """Return the factor of each client's update of each unit that brings its L2 norm to at most `largest`."""
    return (largest / norm_CU.clamp_min(torch.finfo(norm_CU.dtype).tiny)).clamp(max=1.0)


def resize(factors: Factors, rank: int) -> Factors:
    """Return the first `rank` LoRA ranks; missing ones are zero."""
    A_URn, B_UmR = factors
    missing = rank - A_URn.shape[1]
    if missing <= 0:
        return Factors(A_URn[:, :rank], B_UmR[:, :, :rank])
    return Factors(
        torch.cat([A_URn, A_URn.new_zeros(len(A_URn), missing, A_URn.shape[2])], dim=1),
        torch.cat([B_UmR, B_UmR.new_zeros(*B_UmR.shape[:2], missing)], dim=2),
    )


def zero_pad(clients: Sequence[Factors], weight_CU: Tensor) -> Factors:
    """Return the weighted means of A and of B, all padded with zeros to the largest LoRA rank of the clients."""
    rank = max(f.A_URn.shape[1] for f in clients)
    padded = [resize(f, rank) for f in clients]
    share_CU = shares(weight_CU).to(padded[0].A_URn.dtype)
    return Factors(*(torch.einsum("cu,cuxy->uxy", share_CU, torch.stack(part)) for part in zip(*padded, strict=True)))


def delta_norm(factors: Factors) -> Tensor:
    """Return ||B A||_F of each unit, [U], without forming the m x n product."""
    A_URn, B_UmR = factors
    # ||B A||_F^2 = tr(A^T B^T B A) = sum of the elements of A * (B^T B A); rounding may leave it below zero
    return (A_URn * (B_UmR.mT @ B_UmR @ A_URn)).sum(dim=(1, 2)).clamp_min(0).sqrt()


def hetlora(clients: Sequence[Factors], weight_CU: Tensor) -> Factors:
    """Merge as `zero_pad` with weights ||B_c A_c||_F (HetLoRA, arXiv 2401.06432).

    The data weights say only which clients count. Where every norm is zero they are the weights [ours].
    """
    norm_CU = torch.stack([delta_norm(f) for f in clients]) * (shares(weight_CU) > 0)
    return zero_pad(clients, torch.where(norm_CU.sum(dim=0) > 0, norm_CU.to(weight_CU.dtype), weight_CU))


def flora(clients: Sequence[Factors], weight_CU: Tensor) -> Factors:
    """Stack A = [w_c A_c], B = [B_c] to LoRA rank sum r_c: B A is exactly sum w_c B_c A_c (FLoRA, arXiv 2409.05976)."""
    share_CU11 = shares(weight_CU)[:, :, None, None].to(clients[0].A_URn.dtype)
    return Factors(
        torch.cat([share * f.A_URn for share, f in zip(share_CU11, clients, strict=True)], dim=1),
        torch.cat([f.B_UmR for f in clients], dim=2),
    )


def flexlora(clients: Sequence[Factors], weight_CU: Tensor) -> Factors:
    """Return the SVD of sum w_c B_c A_c as B = U S, A = V^T, strongest LoRA rank first (FlexLoRA, arXiv 2402.11505)."""
    return _svd(flora(clients, weight_CU))[0]


def florist(clients: Sequence[Factors], weight_CU: Tensor, energy: float) -> Factors:
    """Cut the SVD of `flexlora` for each unit where it holds `energy` of sum S^2 (FLoRIST, arXiv 2506.09199).

    Keep the first p LoRA ranks, the fewest with sum_{i <= p} S_i^2 >= energy * sum S^2. In the others B is zero but A
    stays: with both zero no gradient would ever reach them again [ours].
    """
    factors, S_UR = _svd(flora(clients, weight_CU))
    square_UR = S_UR.double().square()
    # rank i is kept if the ranks before it hold less than the energy: sum_{j < i} S_j^2 < energy * sum S^2
    before_UR = square_UR.cumsum(dim=1) - square_UR
    kept_UR = before_UR < energy * square_UR.sum(dim=1, keepdim=True)
    return Factors(factors.A_URn, factors.B_UmR * kept_UR.unsqueeze(1))


def _svd(stack: Factors) -> tuple[Factors, Tensor]:
    """Return the SVD B A = U S V^T as factors (B = U S, A = V^T), and S, [U, min(R, m, n)].

    QR of both factors leaves an SVD of at most R x R; the m x n product is never formed.
    """
    # B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T
    Q_B, R_B = torch.linalg.qr(stack.B_UmR)
    Q_A, R_A = torch.linalg.qr(stack.A_URn.mT)
    # the small SVD: R_B R_A^T = U S V^T
    U, S_UR, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    # Q_B U and Q_A V have orthonormal columns: A = (Q_A V)^T = V^T Q_A^T, B = Q_B U S
    return Factors(Vh @ Q_A.mT, Q_B @ (U * S_UR.unsqueeze(1))), S_UR
