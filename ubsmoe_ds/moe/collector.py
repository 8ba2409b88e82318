"""Pseudo-gradients at work in one client: collected during backward, summed over its ranks once per step.

What a rank knows under expert parallelism: of its own tokens everything (input, dL/dy, router, and, by the layer's
all-to-all, the mixture of their active experts); of the experts of other ranks the LoRA factors, gathered once per
step. So each rank computes the pseudo-gradient of ALL experts from ITS tokens, and one all-reduce per step over the
client gives every rank the whole sum, of which it keeps its own experts. The cost of both messages is that of the
adapters and does not grow with tokens. Division by the number of ranks matches DeepSpeed's expert gradients.

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
    LoraFactors,
    dense_oracle,
    expert_mean,
    inactive_weight,
    token_weighted,
)

Addition = tuple[nn.Parameter, Tensor]  # an expert's LoRA parameter and its pseudo-gradient, fp32


class PseudoGradientCollector:
    """Watches the layers of one client; `begin_step`, backward passes, then `reduce`.

    Args:
        layers: the model's UB-SMoE layers, in order, their expert groups set (after `deepspeed.initialize`).
        estimator: "expert_mean", "token_weighted" or "dense_oracle".
        rho: scale of the pseudo-gradient.
    """

    def __init__(self, layers: Sequence[UBSMoE], estimator: str, rho: float) -> None:
        self.layers, self.estimator, self.rho = layers, estimator, rho
        self._factors: list[LoraFactors] = []
        self._base: list[dict[str, Tensor]] = []
        self._sums: list[dict[str, Tensor]] = [{} for _ in layers]
        for i, layer in enumerate(layers):
            layer.deepspeed_moe.observer = partial(self._observe, i)
            if estimator == "expert_mean":
                for name, pair in layer.experts.factors().items():
                    for part, parameter in zip("AB", pair, strict=True):
                        parameter.register_hook(partial(self._add_gradient, i, f"{name}_{part}"))
            elif estimator == "dense_oracle":
                names = list(layer.experts.base())
                self._base.append(
                    dict(zip(names, _gather_experts(layer, list(layer.experts.base().values())), strict=True))
                )

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimiser step: fetch the factors of the experts of other ranks."""
        self.discard()
        if self.estimator == "expert_mean":
            return
        for layer in self.layers:
            own = layer.experts.factors()
            flat = _gather_experts(layer, [factor.detach() for name in PROJECTIONS for factor in own[name]])
            self._factors.append({name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(PROJECTIONS)})

    def discard(self) -> None:
        """Forget what was collected, as after a timing run."""
        self._factors = []
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
            pseudo = self._from_sums(total)
            first, count = layer.experts.first, layer.num_local_experts
            for name, pair in layer.experts.factors().items():
                for parameter, gradient in zip(pair, pseudo[name], strict=True):
                    additions.append((parameter, gradient[first : first + count] / world))
        self.discard()
        return additions

    def _from_sums(self, total: dict[str, Tensor]) -> LoraFactors:
        pairs = {name: (total[f"{name}_A"], total[f"{name}_B"]) for name in PROJECTIONS}
        return (
            expert_mean(total["pseudo_mass"], total["active_mass"], pairs) if self.estimator == "expert_mean" else pairs
        )

    @torch.no_grad()
    def _observe(self, index: int, tokens: TokenGradients) -> None:
        """One layer's backward pass of one micro-batch."""
        routing = tokens.routing
        c_TE = inactive_weight(routing.p_TE, routing.active_TE, self.rho) * routing.used_T.unsqueeze(-1)
        if self.estimator == "expert_mean":
            self._add(index, "pseudo_mass", c_TE.sum(0))
            self._add(index, "active_mass", (routing.p_TE * routing.active_TE).sum())
            return
        scaling = self.layers[index].experts.scaling
        if self.estimator == "token_weighted":
            pseudo = token_weighted(tokens.x_TD, tokens.delta_TD, c_TE, tokens.mixture, self._factors[index], scaling)
        else:
            pseudo = dense_oracle(tokens.x_TD, tokens.delta_TD, c_TE, self._base[index], self._factors[index], scaling)
        for name in PROJECTIONS:
            for part, gradient in zip("AB", pseudo[name], strict=True):
                self._add(index, f"{name}_{part}", gradient)

    def _add_gradient(self, index: int, key: str, gradient_Exx: Tensor) -> None:
        self._add(index, key, gradient_Exx.detach().float().sum(0))

    def _add(self, index: int, key: str, value: Tensor) -> None:
        sums = self._sums[index]
        sums[key] = sums[key] + value if key in sums else value


def _gather_experts(layer: UBSMoE, local: list[Tensor]) -> list[Tensor]:
    """Stacks [E local, ...] of this rank -> stacks [E, ...] of all ranks of its expert group, in one message."""
    if layer.ep_size == 1:
        return local
    flat = torch.cat([part.reshape(-1) for part in local])
    gathered = flat.new_empty(layer.ep_size * flat.numel())
    torch.distributed.all_gather_single(gathered, flat, group=layer.deepspeed_moe.ep_group)
    by_rank = gathered.view(layer.ep_size, -1).split([part.numel() for part in local], dim=1)
    return [piece.reshape(-1, *part.shape[1:]) for piece, part in zip(by_rank, local, strict=True)]
