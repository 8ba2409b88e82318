"""A UB-SMoE language model: a transformers decoder whose blocks conversion.py has replaced, and its LoRA adapters.

Shapes: B rows, S positions, A answer positions, V vocabulary, E experts, D model width.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ubsmoe_ds.models.hf_config import check_window, sliding_window
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.layer import UBSMoE

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer plus s B A x, for attention; the experts have their own stacked form."""

    def __init__(
        self, base: nn.Linear, lora_rank: int, full_rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base
        self.full_rank = full_rank
        self.scaling = alpha / lora_rank
        self.lora_A = nn.Parameter(self.draw_adapter(generator)[:lora_rank].clone())
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora_rank))

    def draw_adapter(self, generator: torch.Generator) -> Tensor:
        """Draw a new A, [full LoRA rank, in], fp32 on the CPU."""
        bound = 1 / math.sqrt(self.base.in_features)
        return torch.empty(self.full_rank, self.base.in_features).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the precision of x; outside of DeepSpeed, fp32 adapters meet bf16 weights."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * F.linear(F.linear(x, A), B)


class LoraAdapter(NamedTuple):
    """One LoRA adapter of a model: the stacked one of a projection of this rank's experts, or one of attention.

    name: such as "layers.0.experts.gate" or "layers.0.attention.q_proj"
    decoder: index of its decoder layer
    A, B: [E, R, I] and [E, O, R] of experts, [R, I] and [O, R] of attention
    base: the frozen weight, [E, O, I] or [O, I]
    moe: the UB-SMoE layer of experts, which may be spread over ranks; None for attention, which every rank holds
    draw: draws a new A at the full LoRA rank, fp32 on the CPU; the adapters of a decoder share one generator, in order
    """

    name: str
    decoder: int
    A: nn.Parameter
    B: nn.Parameter
    base: Tensor
    moe: UBSMoE | None
    draw: Callable[[torch.Generator], Tensor]


class UBSMoEForCausalLM(nn.Module):
    """The converted model. Trainable: experts' LoRA, phi, and if asked the router and attention's LoRA."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def set_lora_scaling(self, scaling: float) -> None:
        """Set s, by which the product B A of every adapter is multiplied."""
        for module in self.modules():
            if isinstance(module, LoraLinear | StackedExperts):
                module.scaling = scaling

    @property
    def layers(self) -> list[UBSMoE]:
        """Return the UB-SMoE layers, in order; a model may have dense layers between them."""
        return [decoder.mlp for decoder in self.decoders if isinstance(decoder.mlp, UBSMoE)]

    @property
    def decoders(self) -> list[nn.Module]:
        """Return all decoder layers."""
        return list(self.hf.model.layers)

    def forward(
        self,
        input_ids: Tensor,
        used: Tensor,
        answer_position_A: Tensor | None = None,
        branch_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
    ) -> Tensor:
        """Return next-token logits.

        Rows must be padded on the right only: causal attention then never sees padding, so plain texts need no mask.
        For sequences of several rows transformers derives the mask from the positions, with the model's sliding window,
        in the form that its attention implementation takes.

        Args:
            input_ids: [B, S] int64.
            used: [B, S] bool, False for padding; padding is not routed to experts.
            answer_position_A: flat positions (b * S + s) whose next token is asked for; None: all.
            branch_BS: marks several continuations of one beginning in a row, see `Tokens`; None: plain texts.
            position_BS: positions of several rows in a sequence, see `Tokens`; None: a sequence is a row.

        Returns:
            [A, V] or [B, S, V] in fp32.

        Raises:
            UserError: as `check_window`.
        """
        for layer in self.layers:
            layer.used_token = used
        attention = {} if branch_BS is None else self._branches(branch_BS)
        if position_BS is not None:
            attention = {"position_ids": position_BS}
        hidden = self.hf.model(input_ids=input_ids, use_cache=False, **attention).last_hidden_state
        if answer_position_A is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, answer_position_A)
        return self.hf.lm_head(hidden).float()

    def _branches(self, branch_BS: Tensor) -> dict[str, Tensor]:
        """Return mask and positions: a token sees the tokens before it in the beginning and in its own continuation."""
        query_BS1, key_B1S = branch_BS.unsqueeze(2), branch_BS.unsqueeze(1)
        seen_BSS = ((key_B1S == 0) | (key_B1S == query_BS1)).tril()
        if sliding_window(self.hf.config) < branch_BS.shape[1]:  # few models have one so short
            check_window(self.hf.config, int(seen_BSS.sum(2).max()))
        mask_BSS = torch.zeros_like(seen_BSS, dtype=self.hf.dtype).masked_fill(
            ~seen_BSS, torch.finfo(self.hf.dtype).min
        )
        return {"attention_mask": mask_BSS.unsqueeze(1), "position_ids": seen_BSS.sum(2) - 1}

    def auxiliary_loss(self, penalty: float, load_balancing: float) -> Tensor:
        """Return penalty * (range penalty of phi) + load_balancing * l_aux of the last forward pass, over layers."""
        total = torch.zeros((), device=self.layers[0].gate.phi.device)
        for layer in self.layers:
            if penalty:
                total = total + penalty * layer.gate.range_penalty()
            if load_balancing:
                total = total + load_balancing * layer.deepspeed_moe.l_aux
        return total

    def adapters(self) -> Iterator[LoraAdapter]:
        """Iterate over the LoRA adapters by decoder layer: gate, up and down of its experts, then its attention."""
        for index, decoder in enumerate(self.decoders):
            if isinstance(decoder.mlp, UBSMoE):
                experts, base = decoder.mlp.experts, decoder.mlp.experts.base()
                for name, (A, B) in experts.factors().items():
                    draw = partial(experts.draw_adapter, name)
                    yield LoraAdapter(f"layers.{index}.experts.{name}", index, A, B, base[name], decoder.mlp, draw)
            for name in ATTENTION_PROJECTIONS:
                linear = getattr(decoder.self_attn, name)
                if isinstance(linear, LoraLinear):
                    A, B, weight = linear.lora_A, linear.lora_B, linear.base.weight
                    yield LoraAdapter(
                        f"layers.{index}.attention.{name}", index, A, B, weight, None, linear.draw_adapter
                    )

    def tail_penalty(self, first: int) -> Tensor:
        """Return the sum over modules of ||B[:, first:]|| ||A[first:, :]||, a scalar: HetLoRA's self-pruning.

        Experts count as often as they are spread over ranks, which the engine's mean over ranks undoes. Source: arXiv
        2401.06432.
        """
        total = torch.zeros((), device=self.layers[0].gate.phi.device)
        for adapter in self.adapters():
            norm_B = adapter.B[..., first:].float().norm(dim=(-2, -1))
            norm_A = adapter.A[..., first:, :].float().norm(dim=(-2, -1))
            spread = 1 if adapter.moe is None else adapter.moe.ep_size
            total = total + spread * (norm_B * norm_A).sum()
        return total

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors that training changes, of the experts this rank's, by the names of the units.

        Frozen weights of adapted projections are included, because FLoRA merges into them.
        """
        state: dict[str, Tensor] = {}
        for index, decoder in enumerate(self.decoders):
            if isinstance(decoder.mlp, UBSMoE):
                gate = decoder.mlp.gate
                values = {"router.weight": gate.wg.weight, "phi": gate.phi, "scale": gate.scale}
                state |= {f"layers.{index}.{name}": value for name, value in values.items() if value is not None}
        for adapter in self.adapters():
            values = {"lora_A": adapter.A, "lora_B": adapter.B, "weight": adapter.base}
            state |= {f"{adapter.name}.{ending}": value for ending, value in values.items()}
        return state

    def set_active_experts(self, k: int) -> None:
        """Set K in every layer."""
        for layer in self.layers:
            layer.gate.set_active_experts(k)


class SharedExpert(nn.Module):
    """The expert that every token passes beside its K experts (Qwen2-MoE): sigmoid(gate x) * expert(x)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


def lora_generator(seed: int, layer: int, round_number: int = 0) -> torch.Generator:
    """Return the generator of a layer's A, the same for all clients; FLoRA draws new ones each round."""
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 100_003 + round_number)
