"""A Hugging Face mixture-of-experts decoder turned into a UB-SMoE model: same weights, blocks replaced, adapters added.

Shapes: E experts, D model width, F expert width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
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
from ubsmoe_ds.models.families import FAMILIES, Family
from ubsmoe_ds.models.hf_config import read_config, unusable
from ubsmoe_ds.models.weights import WeightFiles
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import GateConfig, UBSMoEGate
from ubsmoe_ds.moe.layer import UBSMoE

Fill = Callable[[dict[str, Tensor], int], None]  # copies the experts from a first one on to where `base` points


@dataclass(frozen=True)
class UBSMoESpec:
    """What conversion adds to a model; `config/sections.py` says what the values mean and checks them.

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
    """Read a local checkpoint folder; of the experts only this rank's are read.

    With K equal to the checkpoint's `num_experts_per_tok`, fresh adapters (B = 0) and phi = 0 the logits are those of
    the base model.

    Args:
        folder: config.json and safetensors; see `WeightFiles`.
        spec: what is added.
        dtype: of the frozen weights.

    Raises:
        UserError: for what is missing, damaged or unsupported.
    """
    config = read_config(folder)
    family = FAMILIES[config.model_type]
    files = WeightFiles(folder)
    _check_sizes(files, config, family)
    hf = _with_one_expert(config, family, dtype)
    setattr(hf.config, family.num_experts, getattr(config, family.num_experts))
    hf.config.num_experts_per_tok = config.num_experts_per_tok
    plain, blocks = _parts(hf)
    routers = {prefix: f"{prefix.removesuffix('mlp.')}{family.block}.gate.weight" for prefix in blocks}
    for name, parameter in plain.items():
        files.read_into(parameter.data, name)
    for prefix, block in blocks.items():
        block.gate.weight = nn.Parameter(
            torch.empty(getattr(config, family.num_experts), config.hidden_size, dtype=dtype)
        )
        files.read_into(block.gate.weight.data, routers[prefix])
    return _replace_blocks(hf, family, spec, lambda prefix: _from_files(files, family, prefix))


def _with_one_expert(config: PreTrainedConfig, family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model without the experts, which are replaced, and without values."""
    small = copy.deepcopy(config)
    setattr(small, family.num_experts, 1)
    small.num_experts_per_tok = 1
    small.output_router_logits = False  # transformers would look for them in its own blocks
    with no_init_weights():
        hf = AutoModelForCausalLM.from_config(small, dtype=dtype, trust_remote_code=False)
    hf.tie_weights()
    return hf


def _parts(hf: PreTrainedModel) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """(parameters that stay as they are, blocks that are replaced), by name and by prefix."""
    blocks = {f"model.layers.{i}.mlp.": decoder.mlp for i, decoder in enumerate(hf.model.layers) if _is_moe(decoder)}
    return {name: p for name, p in hf.named_parameters() if not _is_replaced(name, blocks)}, blocks


def _check_sizes(files: WeightFiles, config: PreTrainedConfig, family: Family) -> None:
    """That the files hold what config.json describes, all of it and in its shapes, before memory is taken for it."""
    folder, layers = files.folder, config.num_hidden_layers
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"model.path: in {str(folder / 'config.json')!r}, num_hidden_layers is {layers!r}, a number")
    files.require([f"model.layers.{layers - 1}.input_layernorm.weight"])
    try:
        with torch.device("meta"):
            plain, blocks = _parts(_with_one_expert(config, family, torch.float32))
    except Exception as error:  # as in `read_config`
        raise unusable(folder, error) from error
    shapes = {name: value.shape for name, value in plain.items()}
    width, experts = getattr(config, family.width), getattr(config, family.num_experts)
    sizes = {family.gate: (width, config.hidden_size), family.down: (config.hidden_size, width)}
    sizes[family.up] = sizes[family.gate]
    others: set[str] = set()
    for prefix in blocks:
        block = f"{prefix.removesuffix('mlp.')}{family.block}"
        shapes[f"{block}.gate.weight"] = torch.Size((experts, config.hidden_size))
        shapes |= {f"{block}.experts.0.{name}.weight": torch.Size(size) for name, size in sizes.items()}
        others |= {f"{block}.experts.{e}.{name}.weight" for e in range(experts) for name in sizes}
    files.require_shapes(shapes)
    files.refuse_others("model.layers.", shapes.keys() | others)


def convert(hf: PreTrainedModel, spec: UBSMoESpec) -> UBSMoEForCausalLM:
    """The same from a model in memory (in place).

    Raises:
        UserError: if expert parallelism does not divide the number of experts, or the activation is not SiLU.
    """
    return _replace_blocks(
        hf, FAMILIES[hf.config.model_type], spec, lambda prefix: _from_memory(hf.get_submodule(prefix))
    )


def _is_moe(decoder: nn.Module) -> bool:
    return hasattr(decoder.mlp, "experts")


def _is_replaced(name: str, blocks: dict[str, nn.Module]) -> bool:
    """Whether a parameter belongs to a block's router or experts."""
    prefix = next((prefix for prefix in blocks if name.startswith(prefix)), None)
    return prefix is not None and name.removeprefix(prefix).split(".")[0] in ("gate", "experts")


def _replace_blocks(
    hf: PreTrainedModel, family: Family, spec: UBSMoESpec, source: Callable[[str], Fill]
) -> UBSMoEForCausalLM:
    """Replace the MoE blocks and freeze everything but the adapters, phi and, if asked, the router."""
    config = hf.config
    num_experts = getattr(config, family.num_experts)
    if num_experts % spec.expert_parallel:
        raise UserError(f"expert_parallel: {spec.expert_parallel} does not divide the model's {num_experts} experts")
    if config.hidden_act != "silu":
        raise UserError(f"model.path: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")
    hf.requires_grad_(False)
    for index, decoder in enumerate(hf.model.layers):
        generator = lora_generator(spec.seed, index)
        if _is_moe(decoder):
            decoder.mlp = convert_block(decoder.mlp, config, spec, generator, source(f"model.layers.{index}.mlp"))
        if spec.lora_attention:
            for name in ATTENTION_PROJECTIONS:
                base = getattr(decoder.self_attn, name)
                setattr(
                    decoder.self_attn,
                    name,
                    LoraLinear(base, spec.lora_rank, spec.full_rank or spec.lora_rank, spec.lora_alpha, generator),
                )
    return UBSMoEForCausalLM(hf)


def convert_block(
    block: Any, config: PreTrainedConfig, spec: UBSMoESpec, generator: torch.Generator, fill: Fill | None = None
) -> UBSMoE:
    """One MoE block of transformers -> `UBSMoE` holding this rank's experts, which `fill` brings; None: the block."""
    family = FAMILIES[config.model_type]
    num_experts, width = getattr(config, family.num_experts), getattr(config, family.width)
    gate = UBSMoEGate(config.hidden_size, num_experts, spec.gate, normalize=family.normalizes(config.to_dict()))
    gate.wg.weight.data.copy_(block.gate.weight)
    gate.wg.weight.requires_grad_(spec.router_trainable)
    count = num_experts // spec.expert_parallel
    experts = StackedExperts(
        (count, width, config.hidden_size),
        block.gate.weight.dtype,
        rank=spec.lora_rank,
        full_rank=spec.full_rank or spec.lora_rank,
        alpha=spec.lora_alpha,
        group_name=f"ep_size_{spec.expert_parallel}",
        generator=generator,
        num_experts=num_experts,
        first=spec.expert_rank * count,
    )
    (fill or _from_memory(block))(experts.base(), experts.first)
    shared = SharedExpert(*(getattr(block, name) for name in family.shared)) if family.shared else None
    return UBSMoE(gate, experts, spec.expert_parallel, shared)


def _from_memory(block: Any) -> Fill:
    """From the stacked weights of a block of transformers."""

    def fill(base: dict[str, Tensor], first: int) -> None:
        local = slice(first, first + len(base["down"]))
        gate_EFD, up_EFD = block.experts.gate_up_proj.data[local].chunk(2, dim=1)
        for name, value in {"gate": gate_EFD, "up": up_EFD, "down": block.experts.down_proj.data[local]}.items():
            base[name].copy_(value)

    return fill


def _from_files(files: WeightFiles, family: Family, prefix: str) -> Fill:
    """From a checkpoint, which has a tensor for each projection of each expert."""
    inside = f"{prefix.removesuffix('mlp')}{family.block}.experts"

    def fill(base: dict[str, Tensor], first: int) -> None:
        stored = {"gate": family.gate, "up": family.up, "down": family.down}
        places = {
            f"{inside}.{first + e}.{stored[name]}.weight": base[name][e]
            for e in range(len(base["down"]))
            for name in stored
        }
        files.require(list(places))
        for name, place in places.items():
            files.read_into(place, name)

    return fill
