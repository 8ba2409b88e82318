"""A UB-SMoE language model: a decoder of transformers whose blocks conversion.py has replaced, with its adapters.

Shapes: B rows, S positions, A answer positions, V vocabulary, E experts, D model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ubsmoe_ds.models.hf_config import check_window, sliding_window
from ubsmoe_ds.moe.layer import UBSMoE

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer plus s B A x; used for attention (the experts have their own stacked form)."""

    def __init__(self, base: nn.Linear, rank: int, full_rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.full_rank = full_rank
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(self.draw_adapters(generator)[:rank].clone())
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def draw_adapters(self, generator: torch.Generator) -> Tensor:
        """A new A, [full rank, in], fp32 on the CPU."""
        bound = 1 / math.sqrt(self.base.in_features)
        return torch.empty(self.full_rank, self.base.in_features).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the precision of x; adapters outside of DeepSpeed are fp32 on weights in bf16."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * F.linear(F.linear(x, A), B)


class UBSMoEForCausalLM(nn.Module):
    """The converted model. Trainable: experts' LoRA, phi, and by choice the router and attention LoRA."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    @property
    def layers(self) -> list[UBSMoE]:
        """The UB-SMoE layers, in order; a model may have dense layers between them."""
        return [decoder.mlp for decoder in self.decoders if isinstance(decoder.mlp, UBSMoE)]

    @property
    def decoders(self) -> list[nn.Module]:
        """All HF decoder layers."""
        return list(self.hf.model.layers)

    def forward(
        self,
        input_ids: Tensor,
        used: Tensor,
        answer_position_A: Tensor | None = None,
        branch_BS: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits.

        Rows are padded on the right only: causal attention then never sees padding, so plain texts need no mask.

        Args:
            input_ids: [B, S] int64.
            used: [B, S] bool, False for padding; padding is not routed to experts.
            answer_position_A: flat positions (b * S + s) whose next token is asked for; None: all.
            branch_BS: several continuations of one beginning in a row, see `Tokens`; None: plain texts.

        Returns:
            [A, V] or [B, S, V] in fp32.

        Raises:
            UserError: as `check_window`.
        """
        for layer in self.layers:
            layer.used_token = used
        attention = {} if branch_BS is None else self._branches(branch_BS)
        hidden = self.hf.model(input_ids=input_ids, use_cache=False, **attention).last_hidden_state
        if answer_position_A is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, answer_position_A)
        return self.hf.lm_head(hidden).float()

    def _branches(self, branch_BS: Tensor) -> dict[str, Tensor]:
        """A token sees what comes before it in the beginning and in its own continuation, and is placed after that."""
        query_BS1, key_B1S = branch_BS.unsqueeze(2), branch_BS.unsqueeze(1)
        seen_BSS = ((key_B1S == 0) | (key_B1S == query_BS1)).tril()
        if sliding_window(self.hf.config) < branch_BS.shape[1]:  # few models have one so short
            check_window(self.hf.config, int(seen_BSS.sum(2).max()))
        mask_BSS = torch.zeros_like(seen_BSS, dtype=self.hf.dtype).masked_fill(
            ~seen_BSS, torch.finfo(self.hf.dtype).min
        )
        return {"attention_mask": mask_BSS.unsqueeze(1), "position_ids": seen_BSS.sum(2) - 1}

    def auxiliary_loss(self, penalty: float, load_balancing: float) -> Tensor:
        """penalty * (range penalty of phi) + load_balancing * (l_aux), summed over layers, of the last forward pass."""
        total = torch.zeros((), device=self.layers[0].gate.phi.device)
        for layer in self.layers:
            if penalty:
                total = total + penalty * layer.gate.range_penalty()
            if load_balancing:
                total = total + load_balancing * layer.deepspeed_moe.l_aux
        return total

    def tail_penalty(self, first: int) -> Tensor:
        """Sum over modules of ||B[:, first:]|| ||A[first:, :]|| (HetLoRA's self-pruning, arXiv 2401.06432), a scalar.

        Experts count as often as they are spread, which the engine's mean over ranks undoes.
        """
        total = torch.zeros((), device=self.layers[0].gate.phi.device)
        for decoder in self.decoders:
            pairs = []
            if isinstance(decoder.mlp, UBSMoE):
                pairs += [(pair, decoder.mlp.ep_size) for pair in decoder.mlp.experts.factors().values()]
            for name in ATTENTION_PROJECTIONS:
                linear = getattr(decoder.self_attn, name)
                if isinstance(linear, LoraLinear):
                    pairs.append(((linear.lora_A, linear.lora_B), 1))
            for (A, B), spread in pairs:
                norms = B[..., first:].float().norm(dim=(-2, -1)) * A[..., first:, :].float().norm(dim=(-2, -1))
                total = total + spread * norms.sum()
        return total

    def named_state(self) -> dict[str, Tensor]:
        """Where what training changes stands, by the names of `federation/units.py`; of the experts this rank's.

        Frozen weights of adapted projections are among it, because FLoRA merges into them.
        """
        found: dict[str, Tensor] = {}
        for index, decoder in enumerate(self.decoders):
            pairs = {}
            if isinstance(decoder.mlp, UBSMoE):
                gate, experts = decoder.mlp.gate, decoder.mlp.experts
                pairs = {f"experts.{name}": (*pair, experts.base()[name]) for name, pair in experts.factors().items()}
                own = {"router.weight": gate.wg.weight, "phi": gate.phi, "scale": gate.scale}
                found |= {f"layers.{index}.{name}": value for name, value in own.items() if value is not None}
            for name in ATTENTION_PROJECTIONS:
                linear = getattr(decoder.self_attn, name)
                if isinstance(linear, LoraLinear):
                    pairs[f"attention.{name}"] = (linear.lora_A, linear.lora_B, linear.base.weight)
            for name, values in pairs.items():
                endings = ("lora_A", "lora_B", "weight")
                found |= {f"layers.{index}.{name}.{e}": value for e, value in zip(endings, values, strict=True)}
        return found

    def set_active_experts(self, k: int) -> None:
        """Choose K in every layer."""
        for layer in self.layers:
            layer.gate.set_active_experts(k)


class SharedExpert(nn.Module):
    """What every token passes beside its K experts (Qwen2-MoE): sigmoid(gate x) * expert(x)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


def lora_generator(seed: int, layer: int, round_number: int = 0) -> torch.Generator:
    """What a layer's A are drawn from: the same for all clients; FLoRA draws anew each round."""
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 100_003 + round_number)
