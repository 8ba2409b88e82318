"""The Universal Pseudo-Gradient (PG): what an expert would have learned from tokens that did not activate it.

Pure functions on gradients and router statistics; nothing here knows of ranks or DeepSpeed. Source: UB-SMoE, arXiv
2605.16690 [paper, in words: the formula is not public to us]; the estimators below are our readings of it.

Shapes: T tokens, D model width, F expert width, E experts, R LoRA rank, Q = 2 R: gate's R, then up's.
LoRA factors are dicts keyed "gate", "up", "down" of (A, B): A_ERD or A_ERF, B_EFR or B_EDR.
An expert's output is W_down h, h = silu(g) * u, with g, u, and the down projection each W x + s B A x, s = alpha / R.
`delta` is dL/dy of the layer's output y; `c_TE` = rho * p * (1 - active) is the weight each inactive expert is given.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PROJECTIONS = ("gate", "up", "down")
LoraFactors = Mapping[str, tuple[Tensor, Tensor]]


class TokenMixture(NamedTuple):
    """What the active experts of each token tell about it, mixed by gamma (their weights normalised to one).

    hidden_TF: hbar = sum_j gamma_j h_j
    gate_TF, up_TF: sum_j gamma_j dL/dg_j / w_j and the same for u, the gradient before the gate weight w_j
    """

    hidden_TF: Tensor
    gate_TF: Tensor
    up_TF: Tensor


def inactive_weight(p_TE: Tensor, active_TE: Tensor, rho: float) -> Tensor:
    """c = rho * p * (1 - active) [paper, in words]: p the full softmax, so that the active experts keep their share."""
    return rho * p_TE * ~active_TE


def token_weighted(
    x_TD: Tensor, delta_TD: Tensor, c_TE: Tensor, mixture: TokenMixture, lora: LoraFactors, scaling: float
) -> LoraFactors:
    """Per-token pseudo-gradient through LoRA's outer products [ours].

    Each inactive expert is taken to respond to a token as the token's active experts did, and the chain rule runs
    through the expert's own LoRA factors:
        dB_down = s sum_x c delta (A_down hbar)^T     dA_down = s B_down^T sum_x c delta hbar^T
        dB_gate = s sum_x c vbar (A_gate x)^T     dA_gate = s B_gate^T sum_x c vbar x^T     (up alike)
    Exact when all experts are equal; useless when their hidden units share no basis (experts trained from scratch).
    The expert's own A_down matters: with the mixture sum_j gamma_j A_down,j h_j of the active experts in its place,
    the cosine with the dense gradient on upcycled experts falls from 0.95 - 0.98 to 0.31 - 0.70.

    Args:
        x_TD, delta_TD: the layer's input and dL/dy.
        c_TE: see `inactive_weight`.
        mixture: see `TokenMixture`.
        lora: factors of all E experts.
        scaling: s = alpha / R.

    Returns:
        (dA, dB) for each projection, shaped like `lora`, in fp32.
    """
    x_TD, delta_TD, c_TE = x_TD.float(), delta_TD.float(), c_TE.float()
    mix = TokenMixture(*(part.float() for part in mixture))
    c_TE1 = c_TE.unsqueeze(-1)
    A_ERF, B_EDR = (factor.float() for factor in lora["down"])
    into_A_TER = c_TE1 * torch.einsum("td,edr->ter", delta_TD, B_EDR)
    from_A_TER = c_TE1 * torch.einsum("tf,erf->ter", mix.hidden_TF, A_ERF)
    grads = {
        "down": (
            scaling * torch.einsum("ter,tf->erf", into_A_TER, mix.hidden_TF),
            scaling * torch.einsum("td,ter->edr", delta_TD, from_A_TER),
        )
    }
    for name, v_TF in (("gate", mix.gate_TF), ("up", mix.up_TF)):
        A_ERD, B_EFR = (factor.float() for factor in lora[name])
        into_A_TER = c_TE1 * torch.einsum("tf,efr->ter", v_TF, B_EFR)
        from_A_TER = c_TE1 * torch.einsum("td,erd->ter", x_TD, A_ERD)
        grads[name] = (
            scaling * torch.einsum("ter,td->erd", into_A_TER, x_TD),
            scaling * torch.einsum("tf,ter->efr", v_TF, from_A_TER),
        )
    return grads


class Moments(NamedTuple):
    """First-order model of an expert: means over the tokens that were active for it, each [E, F] in fp32.

    hidden_EF: mu = E[h]; gate_EF: E[silu'(g) u], the mean dh/dg; up_EF: E[silu(g)], the mean dh/du
    """

    hidden_EF: Tensor
    gate_EF: Tensor
    up_EF: Tensor


def moment_values(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, silu'(g) u and silu(g) of every token: what `Moments` are the means of; zero where g = u = 0."""
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    return silu_NF * up_NF, (sigmoid_NF + silu_NF * (1 - sigmoid_NF)) * up_NF, silu_NF


def response(moments: Moments, lora: LoraFactors, down_EDF: Tensor) -> Tensor:
    """(W_down diag(mean slope) B)^T of gate and up, [E, Q, D] in fp32: how the linearised output answers to A x."""
    slopes = (("gate", moments.gate_EF), ("up", moments.up_EF))
    sloped_EFQ = torch.cat([slope_EF.unsqueeze(2) * lora[name][1].float() for name, slope_EF in slopes], dim=2)
    return (sloped_EFQ.mT.to(down_EDF.dtype) @ down_EDF.mT).float()


class LinearisedSums(NamedTuple):
    """All that `linearised` needs of the tokens; sums, so that ranks and micro-batches add up.

    delta_ED: sum c delta
    into_B_EQD: sum c (A x) delta^T
    into_A_EQD: sum c (response delta) x^T
    """

    delta_ED: Tensor
    into_B_EQD: Tensor
    into_A_EQD: Tensor


def linearised_sums(
    x_TD: Tensor, delta_TD: Tensor, c_TE: Tensor, A_EQD: Tensor, response_EQD: Tensor
) -> LinearisedSums:
    """One batch's part of `linearised`, as four products of all tokens with all experts' factors at once.

    Args:
        x_TD, delta_TD: the layer's input and dL/dy.
        c_TE: see `inactive_weight`.
        A_EQD: A of gate and up, of all E experts.
        response_EQD: see `response`, of all E experts.
    """
    x_TD, delta_TD, c_TE = x_TD.float(), delta_TD.float(), c_TE.float()
    c_TJ = c_TE.repeat_interleave(A_EQD.shape[1], dim=1)  # J = E * Q
    into_B_JD = (c_TJ * (x_TD @ A_EQD.flatten(0, 1).mT)).mT @ delta_TD
    into_A_JD = (c_TJ * (delta_TD @ response_EQD.flatten(0, 1).mT)).mT @ x_TD
    return LinearisedSums(c_TE.mT @ delta_TD, into_B_JD.view_as(A_EQD), into_A_JD.view_as(A_EQD))


def linearised(
    sums: LinearisedSums, moments: Moments, lora: LoraFactors, down_EDF: Tensor, scaling: float
) -> LoraFactors:
    """Pseudo-gradient of experts replaced by their first-order model [ours].

        dB_down = s (sum c delta) (A_down mu)^T                  dA_down = s B_down^T (sum c delta) mu^T
        dB_gate = s diag(E[silu' u]) W_down^T sum c delta (A_gate x)^T
        dA_gate = s sum c (W_down diag(E[silu' u]) B_gate)^T delta x^T         (up alike, with E[silu])
    W_down is the frozen one. An expert that was never active has moments 0 and gets no pseudo-gradient.

    Args:
        sums: of the same experts as the rest; see `linearised_sums`.
        moments: the experts' moments.
        lora: their factors.
        down_EDF: their frozen down projections.
        scaling: s = alpha / R.

    Returns:
        (dA, dB) for each projection, shaped like `lora`, in fp32.
    """
    A_ERF, B_EDR = (factor.float() for factor in lora["down"])
    mu_EF, delta_ED = moments.hidden_EF, sums.delta_ED
    A_mu_ER = torch.einsum("erf,ef->er", A_ERF, mu_EF)
    B_delta_ER = torch.einsum("edr,ed->er", B_EDR, delta_ED)
    into_B_EQF = (sums.into_B_EQD.to(down_EDF.dtype) @ down_EDF).float()
    grads = {
        "down": (
            scaling * B_delta_ER.unsqueeze(2) * mu_EF.unsqueeze(1),
            scaling * delta_ED.unsqueeze(2) * A_mu_ER.unsqueeze(1),
        )
    }
    for name, slope_EF, into_A_ERD, into_B_ERF in zip(
        ("gate", "up"),
        (moments.gate_EF, moments.up_EF),
        sums.into_A_EQD.chunk(2, dim=1),
        into_B_EQF.chunk(2, dim=1),
        strict=True,
    ):
        grads[name] = (scaling * into_A_ERD, scaling * slope_EF.unsqueeze(2) * into_B_ERF.mT)
    return grads


def sample_tokens(delta_TD: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw ceil(share T) tokens, with replacement, in proportion to ||dL/dy||; sums over them weighted are unbiased.

    Tokens with a large gradient decide the pseudo-gradient, and most have next to none.

    Returns:
        (token numbers [N], weights 1 / (N pi) [N]).
    """
    norm_T = delta_TD.float().norm(dim=1) + torch.finfo(torch.float32).tiny
    count = math.ceil(share * len(norm_T))
    drawn_N = torch.multinomial(norm_T, count, replacement=True)
    return drawn_N, norm_T.sum() / (count * norm_T[drawn_N])


def expert_mean(pseudo_mass_E: Tensor, active_mass: Tensor, grad_sum: LoraFactors) -> LoraFactors:
    """The batch's mean expert gradient, weighted by the router's probability (our plain reading of the paper).

        g_i += [sum_x c_i(x)] * [sum_j g_j] / [sum_j sum_x a_j(x) p_j(x)]

    Args:
        pseudo_mass_E: sum_x c_i(x).
        active_mass: sum_x sum_j a_j(x) p_j(x), a scalar; where it is zero nothing was active and the result is zero.
        grad_sum: the true gradients summed over all experts, (A, B) without the leading E.

    Returns:
        (dA, dB) for each projection, with the leading E.
    """
    share_E = torch.where(active_mass > 0, pseudo_mass_E / active_mass.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return {
        name: tuple(share_E.view(-1, 1, 1) * total.unsqueeze(0) for total in pair)  # type: ignore[misc]
        for name, pair in grad_sum.items()
    }


def dense_oracle(
    x_TD: Tensor, delta_TD: Tensor, c_TE: Tensor, base: dict[str, Tensor], lora: LoraFactors, scaling: float
) -> LoraFactors:
    """The true gradient of the inactive experts, by running all of them: the yardstick of tests and studies.

    Args:
        base: frozen weights "gate" [E, F, D], "up" [E, F, D], "down" [E, D, F]; the rest as in `token_weighted`.

    Returns:
        (dA, dB) for each projection, shaped like `lora`, in fp32: the gradient of sum_x delta . sum_i c_i expert_i(x).
    """
    leaves = {name: tuple(f.detach().float().requires_grad_() for f in lora[name]) for name in PROJECTIONS}
    with torch.enable_grad():
        weight = {name: base[name].float() + scaling * B @ A for name, (A, B) in leaves.items()}
        x_ETD = x_TD.detach().float().expand(c_TE.shape[1], -1, -1)
        hidden_ETF = F.silu(x_ETD @ weight["gate"].mT) * (x_ETD @ weight["up"].mT)
        y_TD = torch.einsum("te,etd->td", c_TE.float(), hidden_ETF @ weight["down"].mT)
        flat = torch.autograd.grad((y_TD * delta_TD.float()).sum(), [f for name in PROJECTIONS for f in leaves[name]])
    return {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(PROJECTIONS)}
