"""The UB-SMoE layer on DeepSpeed's `MOELayer` and `MoE`: the only place that reaches into their construction.

Shapes: T tokens, D model width, F expert width, O = 2 F, E experts of the model, N rows, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn
from torch.nn import functional as F

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.moe.expert_mlp import route_rows
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import Routing, UBSMoEGate
from ubsmoe_ds.moe.pseudo_gradient import TokenMixture


class TokenGradients(NamedTuple):
    """One rank's own tokens after a layer's backward pass: the input of every pseudo-gradient."""

    x_TD: Tensor
    delta_TD: Tensor
    routing: Routing
    mixture: TokenMixture | None


@dataclass
class _Seen:
    """A pass so far: forward sets routing and slot_TK (the row of each route), backward delta_TD."""

    x_TD: Tensor
    routing: Routing = field(init=False)
    slot_TK: Tensor = field(init=False)
    delta_TD: Tensor = field(init=False)


class UBSMoELayer(MOELayer):
    """`MOELayer` that can report its tokens, and what their active experts computed, during backward.

    Where a rank holds all experts, its tokens go to them in rows, without `MOELayer`'s slots; under expert parallelism
    `MOELayer` does the dispatch.

    Under expert parallelism the active experts of a token are on several ranks. One all-to-all of width 3 F a slot
    brings their hidden units and gradients back to the token's rank, so that `observer` gets all of the local tokens,
    whichever ranks their experts are on. It is left out for observers that need no mixture.
    """

    observer: Callable[[TokenGradients], None] | None = None
    with_mixture = True
    recomputing = False  # a pass for backward: the graph of the first one reports, so this one need not

    def forward(self, *input: Tensor) -> Tensor:
        """Map x [..., D] and used_token ([T] or None) to y [..., D]."""
        x, used_token = input
        seen = _Seen(x.detach().reshape(-1, x.shape[-1]))
        if self.recomputing:
            l_aux: Any = getattr(self, "l_aux", None)
            try:
                return self._run(x, used_token, seen)
            finally:  # torch ends the pass with an exception once it has what backward needs
                self.l_aux = l_aux
        observing = self.observer is not None and self.training and torch.is_grad_enabled()
        self.experts.on_backward = partial(self._report, seen) if observing and self.with_mixture else None
        y = self._run(x, used_token, seen)
        self.experts.on_backward = None  # the graph holds it; kept here, it would keep this batch alive
        seen.routing = self.gate.routing
        if observing:
            y.register_hook(partial(self._see_delta, seen))
        return y

    def _run(self, x: Tensor, used_token: Tensor | None, seen: _Seen) -> Tensor:
        return super().forward(x, used_token) if self.ep_size > 1 else self._forward_on_one_rank(x, used_token, seen)

    def _forward_on_one_rank(self, x: Tensor, used_token: Tensor | None, seen: _Seen) -> Tensor:
        """Run rows sorted by expert, where all experts are here: no slots, no padding, no wait for their number."""
        x_TD = x.reshape(-1, x.shape[-1])
        self.l_aux, _, _, _, _, weight_KT, self.exp_counts = self.gate(x_TD, used_token)
        _, _, index_KT, location_KT, _, _, kept_E = self.gate.routing
        rows = route_rows(index_KT, location_KT, kept_E, self.gate.most_routes(len(x_TD)))
        assert rows.slot_TK is not None
        seen.slot_TK = rows.slot_TK
        return self.experts.run(x_TD, weight_KT.t().to(x.dtype), rows).view_as(x)

    def _see_delta(self, seen: _Seen, delta: Tensor) -> None:
        """Take dL/dy; without a mixture to wait for, the observer needs no more."""
        seen.delta_TD = delta.reshape_as(seen.x_TD)
        if not self.with_mixture:
            self._observe(seen, None)

    def _report(self, seen: _Seen, h_NF: Tensor, gate_up_NO: Tensor) -> None:
        """Take h and dL/d gate_up of the experts' rows, after their backward pass."""
        self._observe(seen, self._mix(seen, h_NF, gate_up_NO))

    def _observe(self, seen: _Seen, mixture: TokenMixture | None) -> None:
        assert self.observer is not None
        self.observer(TokenGradients(seen.x_TD, seen.delta_TD, seen.routing, mixture))

    @torch.no_grad()
    def _mix(self, seen: _Seen, h_NF: Tensor, gate_up_NO: Tensor) -> TokenMixture:
        """Bring the rows back to their tokens and mix each token's routes by gamma, see `TokenMixture`."""
        routing, width = seen.routing, h_NF.shape[1]
        table = torch.cat([h_NF, gate_up_NO], dim=1)
        kept_TK = (routing.index_KT >= 0).t()
        if self.ep_size > 1:
            table, slot_TK = self._bring_back(table, routing)
        else:
            slot_TK = seen.slot_TK
        # gamma = w / sum w over the kept routes; gradients still have w in them, so they are mixed by 1 / sum w
        weight_TK = routing.weight_KT.t() * kept_TK
        total_T1 = weight_TK.sum(dim=-1, keepdim=True)
        per_total_T1 = torch.where(total_T1 > 0, 1 / total_T1, 0.0)
        values, gradients = table.float().split([width, 2 * width], dim=1)
        gradient_TG = _weighted_rows(gradients, slot_TK, kept_TK * per_total_T1)
        return TokenMixture(_weighted_rows(values, slot_TK, weight_TK * per_total_T1), *gradient_TG.chunk(2, dim=-1))

    def _bring_back(self, table: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return (rows of the local tokens, the row of each route, 0 if dropped) for rows of the local experts.

        A collective (an all-to-all).
        """
        local = table.view(self.num_local_experts, self.ep_size, -1, table.shape[1]).transpose(0, 1).contiguous()
        returned = torch.empty_like(local)
        dist.all_to_all_single(returned, local, group=self.ep_group)
        capacity = local.shape[2]
        slot_KT = torch.where(routing.index_KT >= 0, routing.index_KT * capacity + routing.location_KT, 0)
        return returned.reshape(-1, table.shape[1]), slot_KT.t()


class UBSMoE(MoE):
    """Replaces a Hugging Face sparse MoE block: hidden states in, hidden states out.

    `used_token` is set by the model before each forward pass ([B, S] bool, False for padding), because the HF decoder
    layer calls its block with the hidden states alone.

    Args:
        gate, experts: the UB-SMoE parts, in place of those that `MoE` would build.
        ep_size: number of ranks that share the experts.
        shared: module that every token passes beside its experts, [..., D] -> [..., D]; its output is added.
        returns_pair: whether the decoder layer expects (hidden states, router scores); the scores are None.
    """

    def __init__(
        self,
        gate: UBSMoEGate,
        experts: StackedExperts,
        ep_size: int,
        shared: nn.Module | None = None,
        *,
        returns_pair: bool = False,
    ) -> None:
        num_experts, hidden = gate.wg.weight.shape
        super().__init__(hidden, nn.Identity(), num_experts, ep_size=ep_size)
        self.deepspeed_moe = UBSMoELayer(gate, experts, self.expert_group_name, ep_size, self.num_local_experts)
        self.shared, self.returns_pair = shared, returns_pair
        self.used_token: Tensor | None = None
        self.register_state_dict_pre_hook(_refuse_alone)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:  # type: ignore[override]
        """Map [B, S, D] to [B, S, D]; l_aux and counts stay readable at `deepspeed_moe` and `gate`."""
        y = self.deepspeed_moe(hidden_states, self.used_token)
        y = y if self.shared is None else y + self.shared(hidden_states)
        return (y, None) if self.returns_pair else y

    def set_recomputing(self, recomputing: bool) -> None:
        """Say whether the passes that follow repeat one for its backward, so that nothing is counted twice."""
        self.gate.recomputing = self.experts.recomputing = self.deepspeed_moe.recomputing = recomputing

    @property
    def gate(self) -> UBSMoEGate:
        """Return the layer's gate."""
        return self.deepspeed_moe.gate

    @property
    def experts(self) -> StackedExperts:
        """Return the layer's local experts."""
        return self.deepspeed_moe.experts


def _refuse_alone(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse DeepSpeed's checkpoints, which ask a layer of its own for its state and want a module for each expert.

    Raises:
        UserError: if the layer is asked, and not a model that holds it.
    """
    if not prefix:
        raise UserError(
            "save_checkpoint: DeepSpeed's checkpoints have no place for UB-SMoE layers, whose experts are stacked; use "
            "the checkpoints of launch/train.py (checkpoint.every, --resume), or save the state_dict of the whole model"
        )


def _weighted_rows(table: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return sum_k weight_TK * table[row_TK] without the [T, K, width] intermediate."""
    return F.embedding_bag(row_TK, table.contiguous(), mode="sum", per_sample_weights=weight_TK.contiguous())
