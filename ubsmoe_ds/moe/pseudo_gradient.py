"""Universal Pseudo-Gradients (PG): estimate what an expert would have learned from tokens that did not activate it.

Pure functions on gradients and router statistics; nothing here knows of ranks or DeepSpeed. Source: UB-SMoE, arXiv
2605.16690 [paper, in words: the formula is not public to us]; the estimators below are our readings of it.

Shapes: T tokens, N tokens that an expert learns from, D model width, F expert width, E experts, R LoRA rank.
LoRA factors are dicts keyed "gate", "up", "down" of (A, B): A_ERD or A_ERF, B_EFR or B_EDR.
An expert's output is W_down h, h = silu(g) * u or another activation, with g, u, and the down projection each
W x + s B A x + b, s = alpha / R; few models have biases b.
`delta` is dL/dy of the layer's output y; `c_TE` = rho * p * (1 - active) is the weight each inactive expert is given.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.moe.activations import SWIGLU, Activation

PROJECTIONS = ("gate", "up", "down")
LoraFactors = Mapping[str, tuple[Tensor, Tensor]]


class TokenMixture(NamedTuple):
    """Hidden units and gradients of each token's active experts, mixed by gamma (their weights normalised to one).

    hidden_TF: hbar = sum_j gamma_j h_j
    gate_TF, up_TF: sum_j gamma_j dL/dg_j / w_j and likewise for u: the gradient without the gate weight w_j
    """

    hidden_TF: Tensor
    gate_TF: Tensor
    up_TF: Tensor


def inactive_weight(p_TE: Tensor, active_TE: Tensor, rho: float) -> Tensor:
    """Return c = rho * p * (1 - active) [paper, in words], p the full softmax: the active experts keep their share."""
    return rho * p_TE * ~active_TE


class ExpertTokens(NamedTuple):
    """N tokens for each expert, which differ between experts; gradients have been multiplied by the weight c.

    x_END; delta_END: c delta; hidden_ENF: hbar, gate_ENF and up_ENF: c times those of `TokenMixture`, or None
    """

    x_END: Tensor
    delta_END: Tensor
    hidden_ENF: Tensor | None = None
    gate_ENF: Tensor | None = None
    up_ENF: Tensor | None = None


class Moments(NamedTuple):
    """First-order model of an expert: means over the tokens that activated it, each [E, F] in fp32.

    hidden_EF: mu = E[h]; gate_EF: the mean dh/dg, E[silu'(g) u]; up_EF: the mean dh/du, E[silu(g)]
    """

    hidden_EF: Tensor
    gate_EF: Tensor
    up_EF: Tensor


class Experts(NamedTuple):
    """The experts of one rank, whose pseudo-gradients are computed.

    lora: LoRA factors; scaling: s = alpha / R
    base: frozen weights "gate" [E, F, D], "up" [E, F, D], "down" [E, D, F]
    moments: set for estimators that need them
    activation: of the hidden units
    bias: frozen biases "gate", "up" [E, F], "down" [E, D]; empty where the model has none
    """

    lora: LoraFactors
    scaling: float
    base: Mapping[str, Tensor]
    moments: Moments | None = None
    activation: Activation = SWIGLU
    bias: Mapping[str, Tensor] = {}


class GradientSums(NamedTuple):
    """Sums over a client's tokens and experts, for estimators that need no tokens.

    pseudo_mass_E: sum_x c_i(x) of each expert; active_mass: sum_x sum_j a_j(x) p_j(x), a scalar
    gradients: the true gradients summed over all experts, (A, B) without the leading E
    """

    pseudo_mass_E: Tensor
    active_mass: Tensor
    gradients: LoraFactors


def draw_tokens(
    x_TD: Tensor, delta_TD: Tensor, c_TE: Tensor, mixture: TokenMixture | None, count: int | None
) -> ExpertTokens:
    """Draw `count` tokens for each expert, with replacement, in proportion to c ||dL/dy|| [ours].

    Gradients are weighted by c / (count pi), pi the chance of the token, so that sums over the tokens drawn are
    unbiased estimates of sums over all. Few tokens decide what an inactive expert learns: those with a large gradient
    that the router nearly sent to it.

    Args:
        x_TD, delta_TD: the layer's input and dL/dy.
        c_TE: see `inactive_weight`.
        mixture: given if the estimator needs it.
        count: tokens for each expert; None: all of them, once each.

    Returns:
        The tokens for all experts, in the dtype of x.
    """
    tokens, experts = c_TE.shape
    if count is None:
        token_EN = torch.arange(tokens, device=c_TE.device).expand(experts, tokens)
        weight_EN = c_TE.mT
    else:
        mass_ET = torch.nan_to_num(c_TE.mT * delta_TD.float().norm(dim=1), nan=0.0, posinf=0.0)
        mass_ET = mass_ET + torch.finfo(mass_ET.dtype).tiny  # an expert may have been active for every token
        token_EN = torch.multinomial(mass_ET, count, replacement=True)
        chance_EN = mass_ET.gather(1, token_EN) / mass_ET.sum(1, keepdim=True)
        weight_EN = c_TE.mT.gather(1, token_EN) / (count * chance_EN)
    weight_EN1 = weight_EN.unsqueeze(2).to(x_TD.dtype)
    drawn = ExpertTokens(x_TD[token_EN], delta_TD.to(x_TD.dtype)[token_EN] * weight_EN1)
    if mixture is None:
        return drawn
    hidden_ENF, gate_ENF, up_ENF = (part.to(x_TD.dtype)[token_EN] for part in mixture)
    return drawn._replace(hidden_ENF=hidden_ENF, gate_ENF=gate_ENF * weight_EN1, up_ENF=up_ENF * weight_EN1)


def token_weighted(tokens: ExpertTokens, experts: Experts) -> LoraFactors:
    """Compute the pseudo-gradient token by token, through LoRA's outer products [ours].

    Each inactive expert is assumed to respond to a token as the token's active experts did, and the chain rule runs
    through the expert's own LoRA factors:
        dB_down = s sum_x c delta (A_down hbar)^T     dA_down = s B_down^T sum_x c delta hbar^T
        dB_gate = s sum_x c vbar (A_gate x)^T     dA_gate = s B_gate^T sum_x c vbar x^T     (up alike)
    It is exact when all experts are equal, and useless when their hidden units share no basis (experts trained from
    scratch). The expert's own A_down matters: with the mixture sum_j gamma_j A_down,j h_j of the active experts in its
    place, the cosine with the dense gradient on upcycled experts falls from 0.95 - 0.98 to 0.31 - 0.70.

    Args:
        tokens: drawn for these experts, with the mixture.
        experts: `lora` and `scaling` are used.

    Returns:
        (dA, dB) for each projection, shaped like the factors, in fp32.
    """
    assert tokens.hidden_ENF is not None and tokens.gate_ENF is not None and tokens.up_ENF is not None
    pairs = {  # input and gradient of each projection's output
        "gate": (tokens.x_END, tokens.gate_ENF),
        "up": (tokens.x_END, tokens.up_ENF),
        "down": (tokens.hidden_ENF, tokens.delta_END),
    }
    return {name: _outer(*pair, *experts.lora[name], experts.scaling) for name, pair in pairs.items()}


def _outer(x_ENI: Tensor, dy_ENO: Tensor, A_ERI: Tensor, B_EOR: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (dA, dB) of y = s B A x: dA = (s B^T dy) x^T and dB = s dy (A x)^T, summed over tokens."""
    x_ENI, dy_ENO = x_ENI.float(), scaling * dy_ENO.float()
    return (dy_ENO @ B_EOR.float()).mT @ x_ENI, dy_ENO.mT @ (x_ENI @ A_ERI.float().mT)


def linearised(tokens: ExpertTokens, experts: Experts) -> LoraFactors:
    """Compute the pseudo-gradient of experts replaced by their first-order model [ours].

        dB_down = s (sum c delta) (A_down mu)^T                      dA_down = s B_down^T (sum c delta) mu^T
        dB_gate = s sum z (A_gate x)^T                               dA_gate = s B_gate^T sum z x^T
        z = diag(E[silu' u]) W_down^T c delta                        (up alike, with E[silu])
    W_down is the frozen weight. An expert that was never active has moments 0 and gets no pseudo-gradient.

    Args:
        tokens: drawn for these experts.
        experts: with moments; of `base` the down projection is used.

    Returns:
        (dA, dB) for each projection, shaped like the factors, in fp32.
    """
    assert experts.moments is not None
    moments, lora, scaling = experts.moments, experts.lora, experts.scaling
    through_ENF = (tokens.delta_END @ experts.base["down"]).float()
    delta_E1D = tokens.delta_END.sum(1, keepdim=True, dtype=torch.float32)
    return {
        "gate": _outer(tokens.x_END, moments.gate_EF.unsqueeze(1) * through_ENF, *lora["gate"], scaling),
        "up": _outer(tokens.x_END, moments.up_EF.unsqueeze(1) * through_ENF, *lora["up"], scaling),
        "down": _outer(moments.hidden_EF.unsqueeze(1), delta_E1D, *lora["down"], scaling),
    }


def expert_mean(sums: GradientSums) -> LoraFactors:
    """Give each expert the batch's mean expert gradient, weighted by the router (our plain reading of the paper).

        g_i += [sum_x c_i(x)] * [sum_j g_j] / [sum_j sum_x a_j(x) p_j(x)]

    Where the active mass is zero, nothing was active and the result is zero.

    Returns:
        (dA, dB) for each projection, with the leading E.
    """
    mass = sums.active_mass.clamp_min(torch.finfo(torch.float32).tiny)
    share_E = torch.where(sums.active_mass > 0, sums.pseudo_mass_E / mass, 0.0)
    return {
        name: tuple(share_E.view(-1, 1, 1) * total.unsqueeze(0) for total in pair)  # type: ignore[misc]
        for name, pair in sums.gradients.items()
    }


def dense_oracle(tokens: ExpertTokens, experts: Experts) -> LoraFactors:
    """Compute the true gradient of the inactive experts by running them: the yardstick of tests and studies.

    Args:
        tokens: drawn for these experts.
        experts: all but `moments` is used.

    Returns:
        (dA, dB) for each projection, shaped like the factors, in fp32: the gradient of sum_x c delta . expert_i(x).
    """
    leaves = {name: tuple(f.detach().float().requires_grad_() for f in experts.lora[name]) for name in PROJECTIONS}
    with torch.enable_grad():
        weight = {name: experts.base[name].float() + experts.scaling * B @ A for name, (A, B) in leaves.items()}
        x_END = tokens.x_END.detach().float()
        bias = {name: value.float().unsqueeze(1) for name, value in experts.bias.items()}
        gate_ENF, up_ENF = (x_END @ weight[name].mT + bias.get(name, 0.0) for name in ("gate", "up"))
        hidden_ENF = experts.activation(gate_ENF, up_ENF)
        total = (hidden_ENF @ weight["down"].mT * tokens.delta_END.float()).sum()
        flat = torch.autograd.grad(total, [f for name in PROJECTIONS for f in leaves[name]])
    return {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(PROJECTIONS)}
