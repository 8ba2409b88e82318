"""Turn a Hugging Face mixture-of-experts decoder into a UB-SMoE model: same weights, blocks replaced, adapters added.

Shapes: E experts, D model width, F expert width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.causal_lm import (
    ATTENTION_PROJECTIONS,
    LoraLinear,
    SharedExpert,
    UBSMoEForCausalLM,
    lora_generator,
)
from ubsmoe_ds.models.families import FAMILIES, SILU, Family
from ubsmoe_ds.models.hf_config import read_config, unusable
from ubsmoe_ds.models.stored import (
    HEAD,
    block_name,
    check_block,
    check_files,
    is_tied,
    read_experts,
    read_head,
)
from ubsmoe_ds.models.weights import WeightFiles
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import GateConfig, UBSMoEGate
from ubsmoe_ds.moe.layer import UBSMoE

# copy the frozen weights of the experts from a first one on into views, as `StackedExperts.base` gives them
Fill = Callable[[dict[str, Tensor], int], None]


@dataclass(frozen=True)
class UBSMoESpec:
    """Settings of a conversion; config/sections.py says what the values mean and checks them.

    gate: settings of every layer's gate.
    full_rank: LoRA rank of the shared adapters, of which this client's are the first part; None: `lora_rank`.
    expert_parallel, expert_rank: ranks that share the experts, and this rank's position among them.
    """

    gate: GateConfig
    lora_rank: int = 8
    full_rank: int | None = None
    lora_alpha: float = 16.0
    lora_attention: bool = False
    router_trainable: bool = True
    expert_parallel: int = 1
    expert_rank: int = 0
    seed: int = 0


def load(folder: Path, spec: UBSMoESpec, dtype: torch.dtype = torch.float32) -> UBSMoEForCausalLM:
    """Read a model folder and convert the model; of the experts, read only this rank's.

    With K equal to the model's `num_experts_per_tok`, fresh adapters (B = 0) and phi = 0, the logits are those of the
    base model.

    Args:
        folder: config.json and safetensors; see `WeightFiles`.
        spec: what to add.
        dtype: precision of the frozen weights.

    Raises:
        UserError: if something is missing, damaged or unsupported.
    """
    config = read_config(folder)
    family = FAMILIES[config.model_type]
    files = WeightFiles(folder, family.usual_name)
    _check_files(files, config, family)
    hf = _with_one_expert(config, family, dtype)
    num_experts = getattr(config, family.num_experts)
    setattr(hf.config, family.num_experts, num_experts)
    hf.config.num_experts_per_tok = config.num_experts_per_tok
    kept, blocks = _parts(hf)
    for name, value in kept.items():
        if name in files:
            files.read_into(value, name)
    if is_tied(hf):
        read_head(files, hf)
    for layer, block in blocks.items():
        block.gate.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=dtype))
        files.read_into(block.gate.weight.data, f"{block_name(family, layer)}.gate.weight")
    return replace_blocks(hf, family, spec, lambda layer: partial(read_experts, files, family, layer))


def _with_one_expert(config: PreTrainedConfig, family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """Build transformers' model without values and with one expert a layer, as the experts are replaced anyway."""
    small = copy.deepcopy(config)
    setattr(small, family.num_experts, 1)
    small.num_experts_per_tok = 1
    small.output_router_logits = False  # transformers would look for them in its own blocks
    with no_init_weights():
        hf = AutoModelForCausalLM.from_config(small, dtype=dtype, trust_remote_code=False)
    hf.tie_weights()
    return hf


def _parts(hf: PreTrainedModel) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return (tensors that stay, by name, without a tied head; blocks that are replaced, by layer)."""
    blocks = {layer: decoder.mlp for layer, decoder in enumerate(hf.model.layers) if _is_moe(decoder)}
    replaced = tuple(f"model.layers.{layer}.mlp.{part}." for layer in blocks for part in ("gate", "experts"))
    gone = (*replaced, HEAD) if is_tied(hf) else replaced
    return {name: value for name, value in hf.state_dict().items() if not name.startswith(gone)}, blocks


def _is_moe(decoder: nn.Module) -> bool:
    return hasattr(decoder.mlp, "experts")


def _check_files(files: WeightFiles, config: PreTrainedConfig, family: Family) -> None:
    """Check that files and config.json describe one model, before memory is taken for it."""
    folder = files.folder
    files.require([f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"])
    try:
        with torch.device("meta"):
            kept, blocks = _parts(_with_one_expert(config, family, torch.float32))
    except Exception as error:  # as in `read_config`
        raise unusable(folder, error) from error
    check_files(files, config, family, kept, blocks)


def replace_blocks(
    hf: PreTrainedModel, family: Family, spec: UBSMoESpec, source: Callable[[int], Fill]
) -> UBSMoEForCausalLM:
    """Replace the MoE blocks and freeze everything but the adapters, phi and, if asked, the router.

    Args:
        hf: changed in place.
        family: the model's.
        spec: what to add.
        source: gives, for a layer, the function that brings its experts' weights.

    Raises:
        UserError: if expert parallelism does not divide the number of experts, or the activation is not SiLU.
    """
    config = hf.config
    num_experts = getattr(config, family.num_experts)
    if num_experts % spec.expert_parallel:
        raise UserError(f"expert_parallel: {spec.expert_parallel} does not divide the model's {num_experts} experts")
    if config.hidden_act not in SILU:
        raise UserError(f"model.path: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")
    hf.requires_grad_(False)
    for layer, decoder in enumerate(hf.model.layers):
        generator = lora_generator(spec.seed, layer)
        if _is_moe(decoder):
            decoder.mlp = convert_block(decoder.mlp, config, spec, generator, source(layer))
        if spec.lora_attention:
            _add_attention_lora(decoder.self_attn, spec, generator)
    return UBSMoEForCausalLM(hf)


def _add_attention_lora(attention: nn.Module, spec: UBSMoESpec, generator: torch.Generator) -> None:
    full_rank = spec.full_rank or spec.lora_rank
    for name in ATTENTION_PROJECTIONS:
        base = getattr(attention, name)
        setattr(attention, name, LoraLinear(base, spec.lora_rank, full_rank, spec.lora_alpha, generator))


def convert_block(
    block: Any, config: PreTrainedConfig, spec: UBSMoESpec, generator: torch.Generator, fill: Fill
) -> UBSMoE:
    """Convert one MoE block of transformers.

    Args:
        block: its router and, where the family has them, its shared modules are taken over.
        config: the model's.
        spec: what to add.
        generator: draws the adapters.
        fill: brings the frozen weights of this rank's experts.

    Raises:
        UserError: as `check_block`.
    """
    family = FAMILIES[config.model_type]
    check_block(block, family)
    num_experts, width = getattr(config, family.num_experts), getattr(config, family.width)
    gate = UBSMoEGate(config.hidden_size, num_experts, spec.gate, normalize=family.normalizes(config.to_dict()))
    gate.wg.weight.data.copy_(block.gate.weight)
    gate.wg.weight.requires_grad_(spec.router_trainable)
    count = num_experts // spec.expert_parallel
    experts = StackedExperts(
        (count, width, config.hidden_size),
        block.gate.weight.dtype,
        lora_rank=spec.lora_rank,
        full_rank=spec.full_rank or spec.lora_rank,
        alpha=spec.lora_alpha,
        group_name=f"ep_size_{spec.expert_parallel}",
        generator=generator,
        num_experts=num_experts,
        first=spec.expert_rank * count,
    )
    fill(experts.base(), experts.first)
    shared = SharedExpert(*(getattr(block, name) for name in family.shared)) if family.shared else None
    return UBSMoE(gate, experts, spec.expert_parallel, shared)
