"""Any Hugging Face `OlmoeForCausalLM` turned into a UB-SMoE model: same weights, MoE blocks replaced, adapters added.

Shapes: B rows, S positions, A answer positions, V vocabulary, E experts, D model width, F expert width.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer, OlmoeSparseMoeBlock

from ubsmoe_ds.cost import ModelShape
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import UBSMoEGate
from ubsmoe_ds.moe.layer import UBSMoE

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class UBSMoESpec:
    """What conversion adds to a checkpoint; see `config.py` for the meaning and checks of each value."""

    k: int
    candidates: int
    lora_rank: int = 8
    full_rank: int | None = (
        None  # rank of the whole, of which this client's adapters are the first part; None: the same
    )
    lora_alpha: float = 16.0
    lora_attention: bool = False
    router_trainable: bool = True
    capacity_factor: float | None = None
    min_capacity: int = 4
    phi_range: tuple[float, float] | None = (-1.0, 1.0)
    modulate: str = "weights"
    gate_rescale: str = "none"
    gamma: float = 0.5
    k_max: int | None = None  # None: k
    expert_parallel: int = 1
    expert_rank: int = 0  # position of this rank in its expert group
    seed: int = 0


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
        """[..., in] -> [..., out]."""
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


class UBSMoEForCausalLM(nn.Module):
    """The converted model. Trainable: experts' LoRA, phi, and by choice the router and attention LoRA."""

    def __init__(self, hf: OlmoeForCausalLM) -> None:
        super().__init__()
        self.hf = hf

    @property
    def layers(self) -> list[UBSMoE]:
        """The UB-SMoE layers, in order."""
        return [decoder.mlp for decoder in self.decoders]

    @property
    def decoders(self) -> list[OlmoeDecoderLayer]:
        """The HF decoder layers around them."""
        return list(self.hf.model.layers)

    def forward(self, input_ids: Tensor, used: Tensor, answer_position_A: Tensor | None = None) -> Tensor:
        """Next-token logits.

        Rows are padded on the right only: causal attention then never sees padding, so no attention mask is needed.

        Args:
            input_ids: [B, S] int64.
            used: [B, S] bool, False for padding; padding is not routed to experts.
            answer_position_A: flat positions (b * S + s) whose next token is asked for; None: all.

        Returns:
            [A, V] or [B, S, V] in fp32.
        """
        for layer in self.layers:
            layer.used_token = used
        hidden = self.hf.model(input_ids=input_ids, use_cache=False).last_hidden_state
        if answer_position_A is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, answer_position_A)
        return self.hf.lm_head(hidden).float()

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
            pairs = [(pair, decoder.mlp.ep_size) for pair in decoder.mlp.experts.factors().values()]
            for name in ATTENTION_PROJECTIONS:
                linear = getattr(decoder.self_attn, name)
                if isinstance(linear, LoraLinear):
                    pairs.append(((linear.lora_A, linear.lora_B), 1))
            for (A, B), spread in pairs:
                norms = B[..., first:].float().norm(dim=(-2, -1)) * A[..., first:, :].float().norm(dim=(-2, -1))
                total = total + spread * norms.sum()
        return total

    def set_active_experts(self, k: int) -> None:
        """Choose K in every layer."""
        for layer in self.layers:
            layer.gate.set_active_experts(k)


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> OlmoeForCausalLM:
    """Read a local HF folder (safetensors only, no network, no code from the folder).

    Raises:
        UserError: if the folder or a weight is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {str(folder)!r} is no model folder (config.json is missing)")
    try:
        model, report = OlmoeForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.path: {str(folder)!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"model.path: {str(folder)!r} lacks {len(missing)} tensors, the first is {missing[0]!r}")
    return model


def convert(hf: OlmoeForCausalLM, spec: UBSMoESpec) -> UBSMoEForCausalLM:
    """Replace the MoE blocks of `hf` (in place) and freeze everything but the adapters, phi and, if asked, the router.

    With K equal to the checkpoint's `num_experts_per_tok`, fresh adapters (B = 0) and phi = 0 the logits are unchanged.

    Raises:
        UserError: if expert parallelism does not divide the number of experts, or the activation is not SiLU.
    """
    config: OlmoeConfig = hf.config
    if config.num_experts % spec.expert_parallel:
        raise UserError(
            f"expert_parallel: {spec.expert_parallel} does not divide the model's {config.num_experts} experts"
        )
    if config.hidden_act != "silu":
        raise UserError(f"model.path: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")
    hf.requires_grad_(False)
    for index, decoder in enumerate(hf.model.layers):
        generator = lora_generator(spec.seed, index)
        decoder.mlp = convert_block(decoder.mlp, config, spec, generator)
        if spec.lora_attention:
            for name in ATTENTION_PROJECTIONS:
                base = getattr(decoder.self_attn, name)
                setattr(
                    decoder.self_attn,
                    name,
                    LoraLinear(base, spec.lora_rank, spec.full_rank or spec.lora_rank, spec.lora_alpha, generator),
                )
    return UBSMoEForCausalLM(hf)


def model_shape(config: OlmoeConfig, spec: UBSMoESpec) -> ModelShape:
    """The numbers that FLOPs and bytes depend on."""
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        expert_width=config.intermediate_size,
        num_experts=config.num_experts,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        lora_rank=spec.lora_rank,
        lora_attention=spec.lora_attention,
    )


def lora_generator(seed: int, layer: int, round_number: int = 0) -> torch.Generator:
    """What a layer's A are drawn from: the same for all clients; FLoRA draws anew each round."""
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 100_003 + round_number)


def convert_block(
    block: OlmoeSparseMoeBlock, config: OlmoeConfig, spec: UBSMoESpec, generator: torch.Generator
) -> UBSMoE:
    """One `OlmoeSparseMoeBlock` -> `UBSMoE` holding this rank's experts."""
    gate = UBSMoEGate(
        config.hidden_size,
        config.num_experts,
        spec.k,
        candidates=spec.candidates,
        capacity_factor=spec.capacity_factor,
        min_capacity=spec.min_capacity,
        normalize=config.norm_topk_prob,
        phi_range=spec.phi_range,
        modulate=spec.modulate,
        rescale=spec.gate_rescale,
        gamma=spec.gamma,
        k_max=spec.k_max,
    )
    gate.wg.weight.data.copy_(block.gate.weight)
    gate.wg.weight.requires_grad_(spec.router_trainable)
    count = config.num_experts // spec.expert_parallel
    first = spec.expert_rank * count
    gate_up_EXD = block.experts.gate_up_proj.data[first : first + count]
    base = {
        "gate": gate_up_EXD[:, : config.intermediate_size].clone(),
        "up": gate_up_EXD[:, config.intermediate_size :].clone(),
        "down": block.experts.down_proj.data[first : first + count].clone(),
    }
    experts = StackedExperts(
        base,
        rank=spec.lora_rank,
        full_rank=spec.full_rank or spec.lora_rank,
        alpha=spec.lora_alpha,
        group_name=f"ep_size_{spec.expert_parallel}",
        generator=generator,
        num_experts=config.num_experts,
        first=first,
    )
    return UBSMoE(gate, experts, spec.expert_parallel)
