"""A Hugging Face mixture-of-experts decoder turned into a UB-SMoE model: same weights, blocks replaced, adapters added.

Shapes: B rows, S positions, A answer positions, V vocabulary, E experts, D model width, F expert width.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ubsmoe_ds.cost import ModelShape
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.models.checkpoint import Checkpoint
from ubsmoe_ds.models.families import FAMILIES, Family, read_facts
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import UBSMoEGate
from ubsmoe_ds.moe.layer import UBSMoE

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
Fill = Callable[[dict[str, Tensor], int], None]  # copies the experts from a first one on to where `base` points


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
        if _window(self.hf.config) < branch_BS.shape[1]:  # few models have one so short
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


def read_config(folder: Path) -> PreTrainedConfig:
    """The folder's config.

    Raises:
        UserError: if there is none, it is of a family that is not supported, or no layer has experts.
    """
    read_facts(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its checks of a hundred keys run into
        raise _unusable(folder, error) from error
    every, layers = getattr(config, "decoder_sparse_step", 1), config.num_hidden_layers
    if type(every) is not int or every < 1:
        raise UserError(f"model.path: {folder / 'config.json'}: decoder_sparse_step is {every!r}, must be at least 1")
    if isinstance(layers, int) and not any(is_sparse(config, n) for n in range(every - 1, layers, every)):
        raise UserError(
            f"model.path: {folder / 'config.json'}: none of its {layers} layers has experts; see its "
            "decoder_sparse_step and mlp_only_layers"
        )
    return config


def check_length(config: PreTrainedConfig, length: int, key: str) -> None:
    """That the model has positions for so many tokens, of which `key` is the setting.

    Raises:
        UserError: if it has not.
    """
    if length > config.max_position_embeddings:
        raise UserError(
            f"{key}: {length} exceeds the model's max_position_embeddings, {config.max_position_embeddings}"
        )


def check_window(config: PreTrainedConfig, length: int) -> None:
    """That attention reaches over so many tokens, which the mask of rows with continuations takes for granted.

    Raises:
        UserError: if the model has a shorter sliding window.
    """
    if _window(config) < length:
        raise UserError(
            f"model.path: a question with an answer has {length} tokens, the sliding window {_window(config)}; lower "
            "max_length"
        )


def _window(config: PreTrainedConfig) -> float:
    return getattr(config, "sliding_window", None) or math.inf  # 0 and None: there is none


def _unusable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"model.path: {str(folder / 'config.json')!r} describes no model ({reason}); copy it again")


def load(folder: Path, spec: UBSMoESpec, dtype: torch.dtype = torch.float32) -> UBSMoEForCausalLM:
    """Read a local checkpoint folder; of the experts only this rank's are read.

    With K equal to the checkpoint's `num_experts_per_tok`, fresh adapters (B = 0) and phi = 0 the logits are those of
    the base model.

    Args:
        folder: config.json and safetensors; see `Checkpoint`.
        spec: what is added.
        dtype: of the frozen weights.

    Raises:
        UserError: for what is missing, damaged or unsupported.
    """
    config = read_config(folder)
    family = FAMILIES[config.model_type]
    checkpoint = Checkpoint(folder)
    _check_sizes(checkpoint, config, family)
    hf = _with_one_expert(config, family, dtype)
    setattr(hf.config, family.num_experts, getattr(config, family.num_experts))
    hf.config.num_experts_per_tok = config.num_experts_per_tok
    plain, blocks = _parts(hf)
    routers = {prefix: f"{prefix.removesuffix('mlp.')}{family.block}.gate.weight" for prefix in blocks}
    for name, parameter in plain.items():
        checkpoint.read_into(parameter.data, name)
    for prefix, block in blocks.items():
        block.gate.weight = nn.Parameter(
            torch.empty(getattr(config, family.num_experts), config.hidden_size, dtype=dtype)
        )
        checkpoint.read_into(block.gate.weight.data, routers[prefix])
    return _replace_blocks(hf, family, spec, lambda prefix: _from_files(checkpoint, family, prefix))


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


def _check_sizes(checkpoint: Checkpoint, config: PreTrainedConfig, family: Family) -> None:
    """That the files hold what config.json describes, all of it and in its shapes, before memory is taken for it."""
    folder, layers = checkpoint.folder, config.num_hidden_layers
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"model.path: in {str(folder / 'config.json')!r}, num_hidden_layers is {layers!r}, a number")
    checkpoint.require([f"model.layers.{layers - 1}.input_layernorm.weight"])
    try:
        with torch.device("meta"):
            plain, blocks = _parts(_with_one_expert(config, family, torch.float32))
    except Exception as error:  # as in `read_config`
        raise _unusable(folder, error) from error
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
    checkpoint.require_shapes(shapes)
    checkpoint.refuse_others("model.layers.", shapes.keys() | others)


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


def model_shape(config: PreTrainedConfig, spec: UBSMoESpec) -> ModelShape:
    """The numbers that FLOPs and bytes depend on."""
    family = FAMILIES[config.model_type]
    dense = sum(not is_sparse(config, layer) for layer in range(config.num_hidden_layers))
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        expert_width=getattr(config, family.width),
        num_experts=getattr(config, family.num_experts),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        dense_layers=dense,
        dense_width=config.intermediate_size if dense else 0,
        shared_width=config.shared_expert_intermediate_size if family.shared else 0,
        tied_embeddings=config.tie_word_embeddings,
        normed_queries=family.normed_queries,
        lora_rank=spec.lora_rank,
        lora_attention=spec.lora_attention,
    )


def is_sparse(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer has experts; in Qwen's families some need not."""
    every = getattr(config, "decoder_sparse_step", 1)
    return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % every == 0


def lora_generator(seed: int, layer: int, round_number: int = 0) -> torch.Generator:
    """What a layer's A are drawn from: the same for all clients; FLoRA draws anew each round."""
    return torch.Generator().manual_seed((seed * 10_007 + layer) * 100_003 + round_number)


def convert_block(
    block: Any, config: PreTrainedConfig, spec: UBSMoESpec, generator: torch.Generator, fill: Fill | None = None
) -> UBSMoE:
    """One MoE block of transformers -> `UBSMoE` holding this rank's experts, which `fill` brings; None: the block."""
    family = FAMILIES[config.model_type]
    num_experts, width = getattr(config, family.num_experts), getattr(config, family.width)
    gate = UBSMoEGate(
        config.hidden_size,
        num_experts,
        spec.k,
        candidates=spec.candidates,
        capacity_factor=spec.capacity_factor,
        min_capacity=spec.min_capacity,
        normalize=family.normalizes(config.to_dict()),
        phi_range=spec.phi_range,
        modulate=spec.modulate,
        rescale=spec.gate_rescale,
        gamma=spec.gamma,
        k_max=spec.k_max,
    )
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


def _from_files(checkpoint: Checkpoint, family: Family, prefix: str) -> Fill:
    """From a checkpoint, which has a tensor for each projection of each expert."""
    inside = f"{prefix.removesuffix('mlp')}{family.block}.experts"

    def fill(base: dict[str, Tensor], first: int) -> None:
        stored = {"gate": family.gate, "up": family.up, "down": family.down}
        places = {
            f"{inside}.{first + e}.{stored[name]}.weight": base[name][e]
            for e in range(len(base["down"]))
            for name in stored
        }
        checkpoint.require(list(places))
        for name, place in places.items():
            checkpoint.read_into(place, name)

    return fill
