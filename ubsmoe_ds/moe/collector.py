"""Pseudo-gradients at work in one client: collected during backward, summed over its ranks once per step.

What a rank knows under expert parallelism: of its own tokens everything (input, dL/dy, router, and, by the layer's
all-to-all, the mixture of their active experts); of the experts of other ranks the LoRA factors, gathered once per
step. So each rank computes the pseudo-gradient of ALL experts from ITS tokens, and one all-reduce per step over the
client gives every rank the whole sum, of which it keeps its own experts. The cost of both messages is that of the
adapters and does not grow with tokens. `linearised` finishes after that sum, where an expert's frozen weights, factors
and moments are at home. Division by the number of ranks matches DeepSpeed's expert gradients.

Shapes: T tokens, D model width, F expert width, E experts of the model, R LoRA rank.
"""

from collections.abc import Sequence
from functools import partial

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ubsmoe_ds.moe.layer import TokenGradients, UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import (
    PROJECTIONS,
    LinearisedSums,
    LoraFactors,
    TokenMixture,
    dense_oracle,
    expert_mean,
    inactive_weight,
    linearised,
    linearised_sums,
    response,
    sample_tokens,
    token_weighted,
)

Addition = tuple[nn.Parameter, Tensor]  # an expert's LoRA parameter and its pseudo-gradient, fp32


class PseudoGradientCollector:
    """Watches the layers of one client; `begin_step`, backward passes, then `reduce`.

    Args:
        layers: the model's UB-SMoE layers, in order, their expert groups set (after `deepspeed.initialize`).
        estimator: "expert_mean", "token_weighted", "linearised" or "dense_oracle".
        rho: scale of the pseudo-gradient.
        token_share: share of the tokens it is computed from, see `sample_tokens`; `expert_mean` takes them all.
    """

    def __init__(self, layers: Sequence[UBSMoE], estimator: str, rho: float, token_share: float = 1.0) -> None:
        self.layers, self.estimator, self.rho, self.token_share = layers, estimator, rho, token_share
        self._factors: list[LoraFactors] = []
        self._responses: list[list[Tensor]] = []  # of gate and up: A and response; linearised
        self._base: list[dict[str, Tensor]] = []
        self._sums: list[dict[str, Tensor]] = [{} for _ in layers]
        self.attach()
        for i, layer in enumerate(layers):
            if estimator == "expert_mean":
                for name, pair in layer.experts.factors().items():
                    for part, parameter in zip("AB", pair, strict=True):
                        parameter.register_hook(partial(self._add_gradient, i, f"{name}_{part}"))
            elif estimator == "dense_oracle":
                names = list(layer.experts.base())
                self._base.append(
                    dict(zip(names, _gather_experts(layer, list(layer.experts.base().values())), strict=True))
                )

    def attach(self) -> None:
        """Become the observer of the layers, in place of any other."""
        for i, layer in enumerate(self.layers):
            layer.deepspeed_moe.observer = partial(self._observe, i)
            layer.deepspeed_moe.with_mixture = self.estimator == "token_weighted"

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimiser step: fetch the factors of the experts of other ranks."""
        self.discard()
        if self.estimator == "expert_mean":
            return
        for layer in self.layers:
            own = layer.experts.factors()
            if self.estimator == "linearised":
                self._responses.append(_gather_responses(layer))
                continue
            flat = _gather_experts(layer, [factor.detach() for name in PROJECTIONS for factor in own[name]])
            self._factors.append({name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(PROJECTIONS)})

    def discard(self) -> None:
        """Forget what was collected, as after a timing run."""
        self._factors, self._responses = [], []
        self._sums = [{} for _ in self.layers]

    def reduce(self) -> list[Addition]:
        """Sum over the client's ranks (a collective); what to add to the gradient of each local LoRA parameter."""
        flat = torch.cat([part.reshape(-1) for sums in self._sums for part in sums.values()])
        dist.all_reduce(flat)
        world = dist.get_world_size()
        additions: list[Addition] = []
        offset = 0
        for layer, sums in zip(self.layers, self._sums, strict=True):
            total = {}
            for key, part in sums.items():
                total[key] = flat[offset : offset + part.numel()].view_as(part)
                offset += part.numel()
            pseudo = self._of_local_experts(layer, total)
            for name, pair in layer.experts.factors().items():
                additions += [(p, gradient / world) for p, gradient in zip(pair, pseudo[name], strict=True)]
        self.discard()
        return additions

    def _of_local_experts(self, layer: UBSMoE, total: dict[str, Tensor]) -> LoraFactors:
        """The pseudo-gradient of this rank's experts from the client's sums."""
        experts = layer.experts
        local = slice(experts.first, experts.first + layer.num_local_experts)
        if self.estimator == "linearised":
            sums = LinearisedSums(**{name: part[local] for name, part in total.items()})
            assert experts.moments is not None
            return linearised(sums, experts.moments, experts.factors(), experts.base()["down"], experts.scaling)
        pairs = {name: (total[f"{name}_A"], total[f"{name}_B"]) for name in PROJECTIONS}
        if self.estimator == "expert_mean":
            pairs = dict(expert_mean(total["pseudo_mass"], total["active_mass"], pairs))
        return {name: (A[local], B[local]) for name, (A, B) in pairs.items()}

    @torch.no_grad()
    def _observe(self, index: int, tokens: TokenGradients) -> None:
        """One layer's backward pass of one micro-batch."""
        routing = tokens.routing
        c_TE = inactive_weight(routing.p_TE, routing.active_TE, self.rho) * routing.used_T.unsqueeze(-1)
        layer = self.layers[index]
        layer.gate.pseudo_E += c_TE.sum(0)
        if self.estimator == "expert_mean":
            self._add(index, "pseudo_mass", c_TE.sum(0))
            self._add(index, "active_mass", (routing.p_TE * routing.active_TE).sum())
            return
        x_TD, delta_TD, mixture = tokens.x_TD, tokens.delta_TD, tokens.mixture
        if self.token_share < 1:
            drawn_N, weight_N = sample_tokens(delta_TD, self.token_share)
            x_TD, delta_TD, c_TE = x_TD[drawn_N], delta_TD[drawn_N], c_TE[drawn_N] * weight_N.unsqueeze(1)
            mixture = mixture and TokenMixture(*(part[drawn_N] for part in mixture))
        if self.estimator == "linearised":
            sums = linearised_sums(x_TD, delta_TD, c_TE, *self._responses[index])
            for name, value in sums._asdict().items():
                self._add(index, name, value)
            return
        factors, scaling = self._factors[index], layer.experts.scaling
        if self.estimator == "token_weighted":
            assert mixture is not None
            pseudo = token_weighted(x_TD, delta_TD, c_TE, mixture, factors, scaling)
        else:
            pseudo = dense_oracle(x_TD, delta_TD, c_TE, self._base[index], factors, scaling)
        for name in PROJECTIONS:
            for part, gradient in zip("AB", pseudo[name], strict=True):
                self._add(index, f"{name}_{part}", gradient)

    def _add_gradient(self, index: int, key: str, gradient_Exx: Tensor) -> None:
        self._add(index, key, gradient_Exx.detach().float().sum(0))

    def _add(self, index: int, key: str, value: Tensor) -> None:
        sums = self._sums[index]
        sums[key] = sums[key] + value if key in sums else value


def _gather_responses(layer: UBSMoE) -> list[Tensor]:
    """A_EQD of gate and up, and their `response`, of all experts of the layer: what `linearised_sums` needs."""
    experts = layer.experts
    assert experts.moments is not None
    with torch.no_grad():
        factors = experts.factors()
        A_EQD = torch.cat([factors["gate"][0], factors["up"][0]], dim=1).float()
        return _gather_experts(layer, [A_EQD, response(experts.moments, factors, experts.base()["down"])])


def _gather_experts(layer: UBSMoE, local: list[Tensor]) -> list[Tensor]:
    """Stacks [E local, ...] of this rank -> stacks [E, ...] of all ranks of its expert group, in one message."""
    if layer.ep_size == 1:
        return local
    flat = torch.cat([part.reshape(-1) for part in local])
    gathered = flat.new_empty(layer.ep_size * flat.numel())
    torch.distributed.all_gather_single(gathered, flat, group=layer.deepspeed_moe.ep_group)
    by_rank = gathered.view(layer.ep_size, -1).split([part.numel() for part in local], dim=1)
    return [piece.reshape(-1, *part.shape[1:]) for piece, part in zip(by_rank, local, strict=True)]
