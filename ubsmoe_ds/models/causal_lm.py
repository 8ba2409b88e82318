"""A UB-SMoE language model: a transformers decoder whose blocks conversion.py has replaced, and its LoRA adapters.

Shapes: B rows, S positions, A answer positions, V vocabulary, E experts, D model width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.hf_config import check_window, sliding_window
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.frozen import QuantizedExperts
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.quantized import QuantizedLinear

ATTENTION_PROJECTIONS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.attention))
# operations whose results activation checkpointing keeps: [T, D] each, and costly to compute again
KEPT = [
    torch.ops.ubsmoe_ds.summed_down.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


class LoraLinear(nn.Module):
    """A frozen linear layer plus s B A x, for attention; the experts have their own stacked form."""

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        lora_rank: int,
        full_rank: int,
        alpha: float,
        generator: torch.Generator,
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
    shape: of the frozen weight, [E, O, I] or [O, I]
    base: that weight; None where it is quantised, and nothing can be merged into it
    moe: the UB-SMoE layer of experts, which may be spread over ranks; None for attention, which every rank holds
    draw: draws a new A at the full LoRA rank, fp32 on the CPU; the adapters of a decoder share one generator, in order
    """

    name: str
    decoder: int
    A: nn.Parameter
    B: nn.Parameter
    shape: tuple[int, ...]
    base: Tensor | None
    moe: UBSMoE | None
    draw: Callable[[torch.Generator], Tensor]


class UBSMoEForCausalLM(nn.Module):
    """The converted model. Trainable: experts' LoRA, phi, and if asked the router and attention's LoRA.

    Args:
        hf: transformers' model, whose blocks have been replaced.

    Attributes:
        decoders: all decoder layers.
        layers: the UB-SMoE layers, in order; a model may have dense layers between them.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.decoders: list[nn.Module] = list(hf.model.layers)
        self.layers: list[UBSMoE] = [layer for layer in map(moe_of, self.decoders) if layer is not None]
        self._adapted = [module for module in hf.modules() if isinstance(module, LoraLinear | StackedExperts)]

    def set_lora_scaling(self, scaling: float) -> None:
        """Set s, by which the product B A of every adapter is multiplied."""
        for module in self._adapted:
            module.scaling = scaling

    @property
    def recurrent(self) -> bool:
        """Return whether some layer has a recurrence in place of attention; no mask keeps continuations apart there."""
        return not all(hasattr(decoder, "self_attn") for decoder in self.decoders)

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
        if branch_BS is not None and self.recurrent:
            every_A = torch.arange(input_ids.numel(), device=input_ids.device)
            asked_A = every_A if answer_position_A is None else answer_position_A
            logits_AV = self(*_apart(input_ids, used, asked_A, branch_BS))
            return logits_AV.view(*input_ids.shape, -1) if answer_position_A is None else logits_AV
        for layer in self.layers:
            layer.used_token = used
        attention = {} if branch_BS is None else self._branches(branch_BS)
        if position_BS is not None:
            attention = {"position_ids": position_BS}
        hidden = self.hf.model(input_ids=input_ids, use_cache=False, **attention).last_hidden_state
        if answer_position_A is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, answer_position_A)
        logits = self.hf.lm_head(hidden).float()
        scaling = getattr(self.hf.config, "logits_scaling", 1)  # Granite's
        return logits if scaling == 1 else logits / scaling

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

    def checkpoint_activations(self) -> None:
        """Keep only the decoder layers' inputs and `KEPT` in training; backward computes the rest again, the same bits.

        Counts, moments and the load-balancing loss are those of the first pass, and pseudo-gradients see a token once.
        """
        run = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, self.layers))
        for decoder in self.decoders:  # as `gradient_checkpointing_enable`, which wants gradients of the embedding too
            for name, value in (("gradient_checkpointing", True), ("_gradient_checkpointing_func", run)):
                setattr(decoder, name, value)

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
            layer, attention = moe_of(decoder), getattr(decoder, "self_attn", None)
            if layer is not None:
                experts, frozen = layer.experts, layer.experts.frozen
                base = {} if isinstance(frozen, QuantizedExperts) else frozen.base()
                for name, (A, B) in experts.factors().items():
                    shape, draw = frozen.sizes.projections[name], partial(experts.draw_adapter, name)
                    yield LoraAdapter(f"layers.{index}.experts.{name}", index, A, B, shape, base.get(name), layer, draw)
            for name in FAMILIES[self.hf.config.model_type].attention:
                linear = getattr(attention, name, None)
                if isinstance(linear, LoraLinear):
                    weight, whole_name = linear.base.weight, f"layers.{index}.attention.{name}"
                    yield LoraAdapter(
                        whole_name,
                        index,
                        linear.lora_A,
                        linear.lora_B,
                        tuple(weight.shape),
                        weight if isinstance(weight, Tensor) else None,
                        None,
                        linear.draw_adapter,
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

        Frozen weights of adapted projections are included, because FLoRA merges into them, unless they are quantised.
        """
        state: dict[str, Tensor] = {}
        for index, decoder in enumerate(self.decoders):
            if (layer := moe_of(decoder)) is not None:
                gate = layer.gate
                values = {"router.weight": gate.wg.weight, "phi": gate.phi, "scale": gate.scale}
                state |= {f"layers.{index}.{name}": value for name, value in values.items() if value is not None}
        for adapter in self.adapters():
            values = {"lora_A": adapter.A, "lora_B": adapter.B, "weight": adapter.base}
            state |= {f"{adapter.name}.{end}": value for end, value in values.items() if isinstance(value, Tensor)}
        return state

    def router_biases(self) -> dict[str, Tensor]:
        """Return the routers' frozen biases, "layers.0.router.bias" and ".correction", where the family has them."""
        biases: dict[str, Tensor] = {}
        for index, layer in enumerate(map(moe_of, self.decoders)):
            values = {} if layer is None else {"bias": layer.gate.bias_E, "correction": layer.gate.correction_E}
            biases |= {f"layers.{index}.router.{name}": value for name, value in values.items() if value is not None}
        return biases

    def set_active_experts(self, k: int) -> None:
        """Set K in every layer."""
        for layer in self.layers:
            layer.gate.set_active_experts(k)


def _contexts(layers: list[UBSMoE]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a decoder layer's first pass, and of the one in backward."""
    first, again = create_selective_checkpoint_contexts(KEPT)
    return first, _again(layers, again)


@contextmanager
def _again(layers: list[UBSMoE], kept: AbstractContextManager[None]) -> Iterator[None]:
    for layer in layers:
        layer.set_recomputing(True)
    try:
        with kept:
            yield
    finally:
        for layer in layers:
            layer.set_recomputing(False)


def moe_of(decoder: nn.Module) -> UBSMoE | None:
    """Return a decoder layer's UB-SMoE layer; a model may have dense layers too."""
    return next((child for child in decoder.children() if isinstance(child, UBSMoE)), None)


def _apart(ids_BS: Tensor, used_BS: Tensor, position_A: Tensor, branch_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every continuation of a beginning a row of its own, with the beginning.

    Returns:
        (ids, used, positions) as `UBSMoEForCausalLM.forward` takes them; what is asked of a beginning, and of padding,
        is asked in the row of the first continuation.
    """
    rows: list[tuple[int, Tensor]] = []  # of the packed batch: row, and positions
    for b, branch_S in enumerate(branch_BS):
        for number in range(max(1, int(branch_S.max())), 0, -1):  # the first last: the beginning is asked for there
            seen_S = used_BS[b] & ((branch_S == 0) | (branch_S == number))
            rows.append((b, seen_S.nonzero().squeeze(1)))
    longest, place_BS = max(len(seen_T) for _, seen_T in rows), torch.zeros_like(ids_BS)
    ids, used = ids_BS.new_zeros(len(rows), longest), used_BS.new_zeros(len(rows), longest)
    for n, (b, seen_T) in enumerate(rows):
        length = len(seen_T)
        ids[n, :length], used[n, :length] = ids_BS[b, seen_T], True
        place_BS[b, seen_T] = n * longest + torch.arange(length, device=ids.device)
    return ids, used, place_BS.flatten()[position_A]


def lora_generator(seed: int, layer: int, round_number: int = 0) -> torch.Generator:
    """Return the generator of a layer's A, the same for all clients; FLoRA draws new ones each round."""
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 100_003 + round_number)
