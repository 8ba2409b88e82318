"""Turn a Hugging Face mixture-of-experts decoder into a UB-SMoE model: same weights, blocks replaced, adapters added.

Shapes: E experts, D model width, F expert width.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.block_check import (
    activation_of,
    check_block,
    check_head,
    check_same,
    fill_gate,
    router_of,
    router_shapes,
    set_tensor,
    shared_of,
)
from ubsmoe_ds.models.causal_lm import (
    LoraLinear,
    UBSMoEForCausalLM,
    lora_generator,
)
from ubsmoe_ds.models.families import FAMILIES, SILU
from ubsmoe_ds.models.family import Family
from ubsmoe_ds.models.hf_config import is_sparse, read_config, unusable
from ubsmoe_ds.models.stored import (
    HEAD,
    block_name,
    check_files,
    is_tied,
    read_experts,
    read_head,
)
from ubsmoe_ds.models.weights import WeightFiles
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.frozen import FrozenExperts, QuantizedExperts, Sizes, WholeExperts, Workspace
from ubsmoe_ds.moe.gate import GateConfig, UBSMoEGate
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.quantized import QuantizedLinear

Fill = Callable[[StackedExperts], None]  # copies the frozen weights and biases of the experts of this rank into them


@dataclass(frozen=True)
class UBSMoESpec:
    """Settings of a conversion; config/sections.py says what the values mean and checks them.

    gate: settings of every layer's gate.
    full_rank: LoRA rank of the shared adapters, of which this client's are the first part; None: `lora_rank`.
    quantize: how experts and linear layers are kept, see `QuantizedWeight`; None: as they are.
    expert_parallel, expert_rank: ranks that share the experts, and this rank's position among them.
    """

    gate: GateConfig
    lora_rank: int = 8
    full_rank: int | None = None
    lora_alpha: float = 16.0
    lora_attention: bool = False
    router_trainable: bool = True
    quantize: str | None = None
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
        dtype: precision of the frozen weights, or of what they are dequantised to.

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
    kept, blocks = _parts(hf, family)
    linears = _linears(hf, family) if spec.quantize else {}
    for name in [*kept]:
        if name in files:
            files.read_into(kept[name], name)
        del kept[name]
        if name in linears:  # one after the other, so that what is read takes little memory beside what is kept
            _quantize(hf, linears[name], spec)
    if is_tied(hf):
        read_head(files, hf)
    for layer, block in blocks.items():
        for name, shape in router_shapes(block, family, num_experts).items():
            value = torch.empty(shape, dtype=attrgetter(name)(block).dtype)
            files.read_into(value, f"{block_name(family, layer)}.{name}")
            set_tensor(block, name, value)

    def source(layer: int) -> Fill:
        def fill(ours: StackedExperts) -> None:
            ours.frozen.fill(lambda base, bias: read_experts(files, family, layer, base, bias, ours.first))

        return fill

    return replace_blocks(hf, family, spec, source)


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


def _parts(hf: PreTrainedModel, family: Family) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Return (tensors that stay, by usual name, without a tied head; blocks that are replaced, by layer)."""
    blocks = {
        n: getattr(decoder, family.module) for n, decoder in enumerate(hf.model.layers) if _is_moe(decoder, family)
    }
    kept = {}
    for name, value in hf.state_dict().items():
        layer, _, rest = name.removeprefix("model.layers.").partition(f".{family.module}.")
        replaced = layer.isdecimal() and int(layer) in blocks and not f"{rest}.".startswith(_prefixes(family.shared))
        if not replaced and not (name == HEAD and is_tied(hf)):
            kept[family.usual_name(name)] = value
    return kept, blocks


def _linears(hf: PreTrainedModel, family: Family) -> dict[str, str]:
    """Return the paths of the linear layers that are quantised, by their weights' usual names.

    They are all of the decoder layers that stay, but for the gate of a shared expert.
    """
    modules = dict(hf.named_modules())
    names = [name.removesuffix(".weight") for name in hf.state_dict() if name.startswith("model.layers.")]
    gates = tuple(f".{family.module}.{name}" for name in family.shared[1:])
    kept, _ = _parts(hf, family)
    return {
        family.usual_name(f"{path}.weight"): path
        for path in names
        if isinstance(modules.get(path), nn.Linear)
        and family.usual_name(f"{path}.weight") in kept
        and not path.endswith(gates)
    }


def _quantize(hf: PreTrainedModel, path: str, spec: UBSMoESpec) -> None:
    """Replace a linear layer."""
    assert spec.quantize is not None
    parent, _, name = path.rpartition(".")
    linear = hf.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    setattr(hf.get_submodule(parent), name, QuantizedLinear(linear, spec.quantize))


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


def _is_moe(decoder: nn.Module, family: Family) -> bool:
    return hasattr(getattr(decoder, family.module, None), "experts")


def _check_files(files: WeightFiles, config: PreTrainedConfig, family: Family) -> None:
    """Check that files and config.json describe one model, before memory is taken for it."""
    folder = files.folder
    files.require([f"model.layers.{config.num_hidden_layers - 1}.post_attention_layernorm.weight"])
    try:
        with torch.device("meta"):
            kept, blocks = _parts(_with_one_expert(config, family, torch.float32), family)
    except Exception as error:  # as in `read_config`
        raise unusable(folder, error) from error
    sparse = [layer for layer in range(config.num_hidden_layers) if is_sparse(config, layer)]
    if [*blocks] != sparse:
        raise UserError(
            f"model.path: {folder / 'config.json'}: by its keys the layers {sparse} have experts, by transformers "
            f"{[*blocks]}; this program cannot train such models"
        )
    for block in blocks.values():
        check_block(block, family)
    num_experts = getattr(config, family.num_experts)
    routers = {layer: router_shapes(block, family, num_experts) for layer, block in blocks.items()}
    check_files(files, config, family, kept, routers)


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
        UserError: if expert parallelism does not divide the number of experts, if the activation is not SiLU, or if
            transformers' blocks are not what the family's line says.
    """
    config = hf.config
    num_experts = getattr(config, family.num_experts)
    if num_experts % spec.expert_parallel:
        raise UserError(f"expert_parallel: {spec.expert_parallel} does not divide the model's {num_experts} experts")
    if family.experts.activation == "swiglu" and config.hidden_act not in SILU:
        raise UserError(f"model.path: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")
    for path in _linears(hf, family).values() if spec.quantize else ():  # of a model that was not read from files
        _quantize(hf, path, spec)
    hf.requires_grad_(False)
    compared, workspace = False, Workspace()
    for layer, decoder in enumerate(hf.model.layers):
        generator = lora_generator(spec.seed, layer)
        if _is_moe(decoder, family):
            block = getattr(decoder, family.module)
            check_block(block, family)
            if not compared:
                check_same(block, hf, family)
                compared = True
            setattr(decoder, family.module, convert_block(block, config, spec, generator, source(layer), workspace))
        if spec.lora_attention:
            _add_attention_lora(decoder, family, spec, generator)
    model = UBSMoEForCausalLM(hf)
    check_head(hf, model)
    return model


def _add_attention_lora(decoder: nn.Module, family: Family, spec: UBSMoESpec, generator: torch.Generator) -> None:
    """Add LoRA to attention's projections, as far as the layer has them: some have a recurrence in its place."""
    attention, full_rank = getattr(decoder, "self_attn", None), spec.full_rank or spec.lora_rank
    for name in family.attention:
        base = getattr(attention, name, None)
        if base is not None:
            setattr(attention, name, LoraLinear(base, spec.lora_rank, full_rank, spec.lora_alpha, generator))


def convert_block(
    block: Any,
    config: PreTrainedConfig,
    spec: UBSMoESpec,
    generator: torch.Generator,
    fill: Fill,
    workspace: Workspace | None = None,
) -> UBSMoE:
    """Convert one MoE block of transformers, which `check_block` has seen.

    Args:
        block: its router and, where the family has them, its shared modules are taken over.
        config: the model's.
        spec: what to add.
        generator: draws the adapters.
        fill: brings the frozen weights of this rank's experts.
        workspace: of the model, where quantised experts are dequantised; None: one of the block's own.

    Raises:
        UserError: as `router_of`, and if more experts are active than the router chooses of.
    """
    family = FAMILIES[config.model_type]
    num_experts, width = getattr(config, family.num_experts), getattr(config, family.width)
    router = router_of(config, family)
    if spec.gate.k > router.most_candidates(num_experts):
        raise UserError(
            f"model.k_max: {spec.gate.k} experts are active, but this model's router chooses among "
            f"{router.most_candidates(num_experts)} at most, those of {family.router.groups[1]} groups; lower it"
        )
    gate = UBSMoEGate(config.hidden_size, num_experts, spec.gate, router, biased=bool(family.router.bias))
    fill_gate(gate, block, family)
    gate.wg.weight.requires_grad_(spec.router_trainable)
    count = num_experts // spec.expert_parallel
    sizes = Sizes(count, width, config.hidden_size, spec.lora_rank, family.experts.biased)
    dtype = block.experts.down_proj.dtype
    if spec.quantize is None:
        frozen: FrozenExperts = WholeExperts(sizes, dtype)
    else:
        frozen = QuantizedExperts(sizes, dtype, spec.quantize, workspace or Workspace())
    experts = StackedExperts(
        frozen,
        full_rank=spec.full_rank or spec.lora_rank,
        alpha=spec.lora_alpha,
        group_name=f"ep_size_{spec.expert_parallel}",
        generator=generator,
        num_experts=num_experts,
        first=spec.expert_rank * count,
        activation=activation_of(config, family),
    )
    fill(experts)
    return UBSMoE(gate, experts, spec.expert_parallel, shared_of(block, family), returns_pair=family.returns_pair)
