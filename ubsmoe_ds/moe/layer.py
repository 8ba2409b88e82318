"""The UB-SMoE layer on DeepSpeed's `MOELayer` and `MoE`: the only place that reaches into their construction.

Shapes: T tokens, D model width, F expert width, E experts of the model, C slots, K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn
from torch.nn import functional as F

from ubsmoe_ds.moe.experts import Activations, StackedExperts
from ubsmoe_ds.moe.gate import Routing, UBSMoEGate
from ubsmoe_ds.moe.pseudo_gradient import TokenMixture


class TokenGradients(NamedTuple):
    """What one rank knows of its own tokens after a layer's backward pass; the input of every pseudo-gradient."""

    x_TD: Tensor
    delta_TD: Tensor
    routing: Routing
    mixture: TokenMixture | None


class UBSMoELayer(MOELayer):
    """`MOELayer` that can report, during backward, what its tokens and their active experts saw.

    Under expert parallelism the active experts of a token live on several ranks. Their hidden units and gradients come
    back to the token's rank by one all-to-all of width 3 F a slot, so that `observer` gets everything of the local
    tokens, whichever ranks their experts are on. Observers that need no mixture are spared that.
    """

    observer: Callable[[TokenGradients], None] | None = None
    with_mixture = True

    def forward(self, *input: Tensor) -> Tensor:
        """x [..., D], used_token [T] or None -> y [..., D]."""
        observing = self.observer is not None and self.training and torch.is_grad_enabled()
        self.experts.keep_activations = observing and self.with_mixture
        y = super().forward(*input)
        if observing and self.with_mixture:
            self._report_when_differentiated(input[0], y, self.gate.routing, self.experts.activations)
            self.experts.activations = None
        elif observing:
            self._report_tokens(input[0], y, self.gate.routing)
        return y

    def _report_tokens(self, x: Tensor, y: Tensor, routing: Routing) -> None:
        x_TD, observer = x.detach().reshape(-1, x.shape[-1]), self.observer
        assert observer is not None
        y.register_hook(lambda delta: observer(TokenGradients(x_TD, delta.reshape_as(x_TD), routing, None)))

    def _report_when_differentiated(self, x: Tensor, y: Tensor, routing: Routing, act: Activations) -> None:
        x_TD = x.detach().reshape(-1, x.shape[-1])
        hidden_ENF = act.hidden_ENF.detach()

        def report(gradients: Sequence[Tensor | None]) -> None:
            handle.remove()  # the hook refers to the graph it hangs on; left there, no step's graph would ever be freed
            delta, gate_ENF, up_ENF = gradients
            if delta is None or gate_ENF is None or up_ENF is None:
                raise RuntimeError("a MoE layer got no gradient; is its output used by the loss?")
            mixture = self._mix(routing, hidden_ENF, gate_ENF, up_ENF)
            assert self.observer is not None
            self.observer(TokenGradients(x_TD, delta.reshape_as(x_TD), routing, mixture))

        handle = torch.autograd.graph.register_multi_grad_hook((y, act.gate_ENF, act.up_ENF), report, mode="all")

    @torch.no_grad()
    def _mix(self, routing: Routing, hidden_ENF: Tensor, gate_ENF: Tensor, up_ENF: Tensor) -> TokenMixture:
        """Bring the slots back to their tokens and mix the routes with gamma."""
        stacked = torch.cat([hidden_ENF, gate_ENF, up_ENF], dim=-1)  # [E local, ranks * C, 3 F]
        local = stacked.view(len(stacked), self.ep_size, -1, stacked.shape[-1]).transpose(0, 1).contiguous()
        if self.ep_size > 1:
            returned = torch.empty_like(local)
            dist.all_to_all_single(returned, local, group=self.ep_group)
            local = returned
        table = local.reshape(-1, local.shape[-1]).float()  # row e * C + c is slot c of expert e
        capacity = len(table) // (self.ep_size * self.num_local_experts)
        kept_TK = (routing.index_KT >= 0).t()
        slot_TK = torch.where(kept_TK, (routing.index_KT * capacity + routing.location_KT).t(), 0)
        weight_TK = routing.weight_KT.float().t() * kept_TK
        total_T1 = weight_TK.sum(dim=-1, keepdim=True)
        per_total_T1 = torch.where(total_T1 > 0, 1 / total_T1, 0.0)
        width = hidden_ENF.shape[-1]
        values, gradients = table.split([width, 2 * width], dim=-1)
        gamma_TK = weight_TK * per_total_T1
        gradient_TG = _weighted_rows(gradients, slot_TK, kept_TK * per_total_T1)
        return TokenMixture(_weighted_rows(values, slot_TK, gamma_TK), *gradient_TG.chunk(2, dim=-1))


class UBSMoE(MoE):
    """A drop-in for a Hugging Face sparse MoE block: hidden states in, hidden states out.

    `used_token` is set by the model before each forward pass ([B, S] bool, False for padding) because the HF decoder
    layer calls its block with the hidden states alone.

    Args:
        gate, experts: the UB-SMoE parts, which replace what `MoE` would build.
        ep_size: ranks that share the experts.
    """

    def __init__(self, gate: UBSMoEGate, experts: StackedExperts, ep_size: int) -> None:
        num_experts, hidden = gate.wg.weight.shape
        super().__init__(hidden, nn.Identity(), num_experts, ep_size=ep_size)
        self.deepspeed_moe = UBSMoELayer(gate, experts, self.expert_group_name, ep_size, self.num_local_experts)
        self.used_token: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[B, S, D] -> [B, S, D]; l_aux and counts stay readable at `deepspeed_moe` and `gate`."""
        return self.deepspeed_moe(hidden_states, self.used_token)

    @property
    def gate(self) -> UBSMoEGate:
        """The layer's gate."""
        return self.deepspeed_moe.gate

    @property
    def experts(self) -> StackedExperts:
        """The layer's local experts."""
        return self.deepspeed_moe.experts


def _weighted_rows(table: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """sum_k weight_TK * table[row_TK] without the [T, K, width] intermediate."""
    return F.embedding_bag(row_TK, table.contiguous(), mode="sum", per_sample_weights=weight_TK.contiguous())
