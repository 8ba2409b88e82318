"""Collect pseudo-gradients (PG) in one client: tokens during backward, gradients once per step where the experts are.

A rank knows its own tokens (input, dL/dy, router and, by the layer's all-to-all, the mixture of their active experts)
and draws some for each expert of the model. One all-to-all a layer brings them to the ranks of the experts, which have
the factors, frozen weights and moments. Replicas of an expert then add up their results. `expert_mean` needs no tokens,
only sums of the real gradients. Division by the number of ranks matches DeepSpeed's expert gradients.

Shapes: T tokens, N tokens drawn for an expert, D model width, E experts, L local experts, P ranks that share the
experts, X values known of a token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ubsmoe_ds.moe import pseudo_gradient
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.layer import TokenGradients, UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import (
    PROJECTIONS,
    Experts,
    ExpertTokens,
    GradientSums,
    LoraFactors,
    draw_tokens,
    inactive_weight,
)

Addition = tuple[nn.Parameter, Tensor]  # an expert's LoRA parameter and its pseudo-gradient, fp32


class PseudoGradientCollector:
    """Observes the layers of one client: `attach` once, then for each step `reset`, backward passes, `reduce`.

    Args:
        layers: the model's UB-SMoE layers, in order, their expert groups set (after `deepspeed.initialize`).
        estimator: a key of `ESTIMATORS`.
        rho: weight of the pseudo-gradient, see `Experiment.rho`.
        tokens_per_expert: number drawn from each micro-batch of each rank, see `draw_tokens`; None: all of them, which
            is exact but costs as much as running every expert, so for tests and studies. `expert_mean` draws none.
    """

    def __init__(
        self, layers: Sequence[UBSMoE], estimator: str, rho: float, tokens_per_expert: int | None = None
    ) -> None:
        self.layers, self.estimator = layers, ESTIMATORS[estimator]
        self._function = getattr(pseudo_gradient, self.estimator.function)
        self.rho, self.tokens_per_expert = rho, tokens_per_expert
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._hooks: list[RemovableHandle] = []
        self.reset()

    def attach(self) -> Self:
        """Become the layers' observer; a layer has at most one."""
        for i, layer in enumerate(self.layers):
            layer.deepspeed_moe.observer = partial(self._observe, i)
            layer.deepspeed_moe.with_mixture = self.estimator.mixture
            for name, pair in layer.experts.factors().items() if self.estimator.from_sums else ():
                for part, parameter in zip("AB", pair, strict=True):
                    self._hooks.append(parameter.register_hook(partial(self._add_gradient, i, f"{name}_{part}")))
        return self

    def detach(self) -> None:
        """Restore the layers to their state before `attach`."""
        for layer in self.layers:
            layer.deepspeed_moe.observer = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reset(self) -> None:
        """Drop everything collected: before a step, and after a pass that does not count."""
        self._drawn: list[list[ExpertTokens]] = [[] for _ in self.layers]
        self._sums: list[dict[str, Tensor]] = [{} for _ in self.layers]  # of estimators that compute from sums

    @torch.no_grad()
    def reduce(self) -> list[Addition]:
        """Return what to add to each local LoRA parameter's gradient, over all ranks of the client (a collective)."""
        compute = self._from_sums if self.estimator.from_sums else self._from_tokens
        additions: list[Addition] = []
        for i, layer in enumerate(self.layers):
            pseudo = compute(i)
            for name, pair in layer.experts.factors().items() if pseudo else ():
                additions += zip(pair, pseudo[name], strict=True)
        self.reset()
        return additions if self.estimator.from_sums else self._over_replicas(additions)

    def _from_tokens(self, index: int) -> LoraFactors:
        """Compute a layer's pseudo-gradient for its local experts from tokens of the ranks that share experts."""
        drawn, experts = self._drawn[index], self.layers[index].experts
        if not drawn:
            return {}
        parts = [torch.cat(micro, dim=1) for micro in zip(*drawn, strict=True) if micro[0] is not None]
        tokens = ExpertTokens(*self._to_their_experts(self.layers[index], parts))
        known = Experts(
            experts.factors(), experts.scaling, experts.base(), experts.moments, experts.activation, experts.bias()
        )
        return self._function(tokens, known)

    def _from_sums(self, index: int) -> LoraFactors:
        """Compute it from sums over the client's ranks and experts."""
        layer, sums = self.layers[index], self._sums[index]
        if not sums:
            return {}
        flat = torch.cat([part.reshape(-1) for part in sums.values()])
        if self._world > 1:
            dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in sums.values()])
        total = {key: piece.view_as(part) for (key, part), piece in zip(sums.items(), pieces, strict=True)}
        local = slice(layer.experts.first, layer.experts.first + layer.num_local_experts)
        gradients = {name: (total[f"{name}_A"], total[f"{name}_B"]) for name in PROJECTIONS}
        return self._function(GradientSums(total["pseudo_mass"][local], total["active_mass"], gradients))

    def _to_their_experts(self, layer: UBSMoE, parts: list[Tensor]) -> list[Tensor]:
        """Exchange this rank's tokens [E, N, ...] for those of the local experts from all ranks, [L, P N, ...]."""
        if layer.ep_size == 1:
            return parts
        group = layer.deepspeed_moe.ep_group
        drawn_ENX = torch.cat(parts, dim=2)
        if self.tokens_per_expert is None:  # all tokens, of which ranks may have different numbers
            longest = torch.tensor(drawn_ENX.shape[1], device=drawn_ENX.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
            drawn_ENX = F.pad(drawn_ENX, (0, 0, 0, int(longest) - drawn_ENX.shape[1]))
        received = torch.empty_like(drawn_ENX)
        dist.all_to_all_single(received, drawn_ENX.contiguous(), group=group)
        by_rank_PLNX = received.view(layer.ep_size, layer.num_local_experts, *drawn_ENX.shape[1:])
        return list(by_rank_PLNX.transpose(0, 1).flatten(1, 2).split([part.shape[2] for part in parts], dim=2))

    def _over_replicas(self, additions: list[Addition]) -> list[Addition]:
        """Sum over the ranks that hold the same experts, in one message."""
        if self._world == self.layers[0].ep_size or not additions:
            return additions
        flat = torch.cat([gradient.reshape(-1) for _, gradient in additions])
        dist.all_reduce(flat, group=groups._get_expert_data_parallel_group(self.layers[0].expert_group_name))
        pieces = flat.split([parameter.numel() for parameter, _ in additions])
        return [(parameter, piece.view_as(parameter)) for (parameter, _), piece in zip(additions, pieces, strict=True)]

    @torch.no_grad()
    def _observe(self, index: int, tokens: TokenGradients) -> None:
        """Take one layer's backward pass of one micro-batch."""
        routing = tokens.routing
        scaling = self.layers[index].gate.router.scaling  # factor of all weights
        c_TE = inactive_weight(routing.p_TE, routing.active_TE, self.rho * scaling) * routing.used_T.unsqueeze(-1)
        c_TE = c_TE / self._world
        if self.estimator.from_sums:
            self._add(index, "pseudo_mass", c_TE.sum(0))
            self._add(index, "active_mass", (routing.p_TE * routing.active_TE).sum() * scaling)
        else:
            drawn = draw_tokens(tokens.x_TD, tokens.delta_TD, c_TE, tokens.mixture, self.tokens_per_expert)
            self._drawn[index].append(drawn)

    def _add_gradient(self, index: int, key: str, gradient_Exx: Tensor) -> None:
        self._add(index, key, gradient_Exx.detach().float().sum(0))

    def _add(self, index: int, key: str, value: Tensor) -> None:
        sums = self._sums[index]
        sums[key] = sums[key] + value if key in sums else value
