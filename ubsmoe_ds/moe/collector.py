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
        interval: of steps after which a layer's pseudo-gradient is computed anew; until then the last one is used
            [ours]. Layers take turns. (Rarer but larger ones would spoil the optimiser's second moments.)
    """

    def __init__(
        self, layers: Sequence[UBSMoE], estimator: str, rho: float, token_share: float = 1.0, interval: int = 1
    ) -> None:
        self.layers, self.estimator, self.rho, self.token_share = layers, estimator, rho, token_share
        self.interval, self._step = interval, -1
        self._last: dict[int, list[Addition]] = {}  # by layer
        self._factors: dict[int, LoraFactors] = {}  # by layer, as what follows
        self._responses: dict[int, list[Tensor]] = {}  # of gate and up: A and response; linearised
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
            layer.deepspeed_moe.with_mixture = self._is_due(i) and self.estimator == "token_weighted"

    def begin_round(self) -> None:
        """Before a round's local steps: what was computed for the weights before the merge is not used again."""
        self._step, self._last = -1, {}

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimiser step: fetch the factors of the experts of other ranks."""
        self.discard()
        self._step += 1
        self.attach()
        if self.estimator == "expert_mean":
            return
        for i, layer in enumerate(self.layers):
            if not self._is_due(i):
                continue
            own = layer.experts.factors()
            if self.estimator == "linearised":
                self._responses[i] = _gather_responses(layer)
                continue
            flat = _gather_experts(layer, [factor.detach() for name in PROJECTIONS for factor in own[name]])
            self._factors[i] = {name: (flat[2 * n], flat[2 * n + 1]) for n, name in enumerate(PROJECTIONS)}

    def _is_due(self, index: int) -> bool:
        """Whether it is a layer's turn in this step; in the first of a round it is everybody's."""
        return self._step == 0 or (self._step + index) % self.interval == 0

    def discard(self) -> None:
        """Forget what was collected, as after a timing run."""
        self._factors, self._responses = {}, {}
        self._sums = [{} for _ in self.layers]

    def reduce(self) -> list[Addition]:
        """Sum over the client's ranks (a collective); what to add to the gradient of each local LoRA parameter."""
        parts = [part.reshape(-1) for sums in self._sums for part in sums.values()]
        if parts:
            flat = torch.cat(parts)
            dist.all_reduce(flat)
            offset = 0
            for i, sums in enumerate(self._sums):
                total = {}
                for key, part in sums.items():
                    total[key] = flat[offset : offset + part.numel()].view_as(part)
                    offset += part.numel()
                if total:
                    self._last[i] = self._additions(self.layers[i], total)
        self.discard()
        return [addition for i in sorted(self._last) for addition in self._last[i]]

    def _additions(self, layer: UBSMoE, total: dict[str, Tensor]) -> list[Addition]:
        """One layer's, from the client's sums."""
        pseudo, world = self._of_local_experts(layer, total), dist.get_world_size()
        pairs = layer.experts.factors()
        return [(p, g / world) for name, pair in pairs.items() for p, g in zip(pair, pseudo[name], strict=True)]

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
        if not self._is_due(index):
            return
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
        if self._is_due(index):
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
