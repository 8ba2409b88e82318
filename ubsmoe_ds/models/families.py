"""The supported families of mixture-of-experts models: what their blocks compute, and their names for the same things.

A family is a decoder of transformers in which a block of a router and stacked experts stands for the MLP of some
layers. Attention, norms and shared experts stay transformers' own. What a line says about the block is compared with
transformers' block when a model is loaded (models/block_check.py). A new family is one entry of `FAMILIES`, and one
model in tests/support/families.py. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json
from ubsmoe_ds.models.family import ExpertsLine, Family, RouterLine

MOST_CONFIG = 2**20  # bytes; a config.json has a few thousand
MOST_LAYERS = 1024  # known models have at most 126
MOST_EXPERTS = 2**16  # of a layer, and of all layers together; known models have some 23,000
MOST_LABELS = 2**16  # of a classifier's; transformers makes a name for each
SILU = ("silu", "swish")  # transformers' names of the experts' activation
ADAPTER = "adapter_config.json"
COUNTS = ("num_experts", "num_local_experts")  # the same number: transformers reads either, and may write the other

_SIGMOID = RouterLine(  # DeepSeek-V3 (arXiv 2412.19437)
    correction="gate.e_score_correction_bias",
    score="sigmoid",
    scaling="routed_scaling_factor",
    groups=("n_group", "topk_group"),
    group_best=2,
)
_DEEPSEEK = Family(
    num_experts="n_routed_experts",
    shared=("shared_experts",),
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    router=_SIGMOID,
)
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")  # multi-head latent attention
_QWEN = Family(shared=("shared_expert", "shared_expert_gate"), shared_width=("shared_expert_intermediate_size",))
_GRANITE = Family(
    block="block_sparse_moe",
    module="block_sparse_moe",
    gate="",
    renamed=(
        ("router.layer.weight", "router.weight"),
        ("input_linear.weight", "experts.gate_up_proj"),
        ("output_linear.weight", "experts.down_proj"),
    ),
    num_experts="num_local_experts",
    width="intermediate_size",
    router=RouterLine(weight="router.weight", normalizes=True),
)

FAMILIES = {
    "olmoe": Family(width="intermediate_size", normed_queries=True),
    "flex_olmo": Family(width="intermediate_size", normed_queries=True),
    "mixtral": Family(
        *("block_sparse_moe", "w1", "w3", "w2"),
        num_experts="num_local_experts",
        width="intermediate_size",
        router=RouterLine(normalizes=True),
    ),
    "qwen2_moe": _QWEN,
    "qwen3_moe": Family(normed_queries=True),
    "qwen3_next": replace(_QWEN, normed_queries=True, gated_attention=True),
    "qwen3_5_moe_text": replace(_QWEN, normed_queries=True, gated_attention=True, router=RouterLine(normalizes=True)),
    "granitemoe": _GRANITE,
    "granitemoeshared": replace(_GRANITE, shared_beside="shared_mlp", shared_width=("shared_intermediate_size",)),
    "deepseek_v2": replace(
        _DEEPSEEK,
        attention=_LATENT,
        router=RouterLine(
            normalizes=False,
            scaling="routed_scaling_factor",
            groups=("n_group", "topk_group"),
            grouped_if=("topk_method", "group_limited_greedy"),
        ),
    ),
    "deepseek_v3": replace(_DEEPSEEK, attention=_LATENT),
    "glm4_moe": _DEEPSEEK,
    "dots1": replace(_DEEPSEEK, normed_queries=True),
    "ernie4_5_moe": Family(
        num_experts="moe_num_experts",
        active="moe_k",
        shared=("shared_experts",),
        shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
        renamed=(("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),),
        router=RouterLine(
            correction="gate.moe_statics.e_score_correction_bias",
            correction_ndim=2,
            normalizes=True,
            least_sum="moe_norm_min",
        ),
    ),
    "hunyuan_v1_moe": Family(
        width="intermediate_size",
        active="moe_topk",
        shared=("shared_mlp",),
        shared_width=("intermediate_size",),
        normed_queries=True,
        router=RouterLine(weight="gate.wg.weight", normalizes=True),
    ),
    "minimax_m2": Family(
        *("block_sparse_moe", "w1", "w3", "w2"),
        num_experts="num_local_experts",
        width="intermediate_size",
        normed_queries=True,
        router=RouterLine(correction="e_score_correction_bias", score="sigmoid", normalizes=True),
    ),
    "gpt_oss": Family(
        gate="",
        num_experts="num_local_experts",
        width="intermediate_size",
        returns_pair=True,
        fused_attention=False,
        router=RouterLine(weight="router.weight", bias="router.bias", normalizes=True),
        experts=ExpertsLine("clamped_swish", biased=True, transposed=True, interleaved=True),
    ),
}
REFUSED = {  # families with a text model in them that is supported
    "qwen3_5_moe": "a model of pictures and text; save its text model alone (model_type qwen3_5_moe_text)",
}


def read_facts(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Return a model folder's family and its config.json, after checking the numbers of experts and of active ones.

    Raises:
        UserError: naming the file, the key and its value.
    """
    path, facts = folder / "config.json", read_bounded(folder)
    kind = facts.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        remedy = REFUSED[kind] if kind in REFUSED else f"supported: {', '.join(FAMILIES)}"
        raise UserError(f"model.path: {path}: has model_type {kind!r}; {remedy}")
    names = dict.fromkeys((family.num_experts, *COUNTS))
    counts = {name: facts[name] for name in names if name in facts}
    if len(set(map(str, counts.values()))) > 1:
        given = " and ".join(counts), " and ".join(map(repr, counts.values()))
        raise UserError(f"model.path: {path}: {given[0]} are {given[1]}; remove one")
    facts |= dict.fromkeys(names, next(iter(counts.values()), None))
    active = facts.get(family.active)
    if isinstance(active, list) and active:  # of each layer
        if any(value != active[0] for value in active):
            raise UserError(
                f"model.path: {path}: {family.active} differs between layers ({str(active)[:60]}); this program has "
                "one K for all layers"
            )
        facts[family.active] = active[0]
    if family.active in facts:
        facts["num_experts_per_tok"] = facts[family.active]
    most = MOST_EXPERTS
    for name in (family.num_experts, family.active):
        if type(facts.get(name)) is not int or not 1 <= facts[name] <= most:  # a bool is not a number here
            raise UserError(f"model.path: {path}: {name} is {facts.get(name)!r}, must be a number from 1 to {most}")
        most = facts[name]
    if facts[family.num_experts] * facts.get("num_hidden_layers", 1) > MOST_EXPERTS:
        raise UserError(
            f"model.path: {path}: {family.num_experts} is {facts[family.num_experts]} and num_hidden_layers "
            f"{facts['num_hidden_layers']}, more than {MOST_EXPERTS} experts"
        )
    _check_plain(folder, facts)
    return family, facts


def predicts_further(name: str, facts: Mapping[str, Any]) -> bool:
    """Return whether a tensor is of layers that predict tokens after the next one (MTP), which transformers leaves out.

    Args:
        name: as `Family.usual_name` gives it.
        facts: of config.json.
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return re.match(r"model\.mtp[._]", name) is not None
    further = facts.get("num_nextn_predict_layers")
    return 0 <= int(layer[1]) - facts.get("num_hidden_layers", MOST_LAYERS) < (further if type(further) is int else 0)


def read_bounded(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json, after checking the numbers and lists that transformers loops over.

    Raises:
        UserError: naming the file, the key and its value.
    """
    path = folder / "config.json"
    try:
        facts = read_json(path, MOST_CONFIG)
    except OSError as error:
        raise UserError(f"model.path: {path}: cannot be read ({error.strerror}); name a model folder") from error
    except ValueError as error:
        raise UserError(f"model.path: {path}: is not valid JSON ({error})") from error
    if not isinstance(facts, dict):
        raise UserError(f"model.path: {path}: must hold key: value pairs, found {type(facts).__name__}")
    for name, most in (("num_hidden_layers", MOST_LAYERS), ("num_labels", MOST_LABELS)):
        value = facts.get(name)
        if name in facts and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"model.path: {path}: {name} is {value!r}, must be a whole number from 1 to {most}")
    for name, value in facts.items():
        if name.endswith("layers") and isinstance(value, list) and len(value) > MOST_LAYERS:
            raise UserError(f"model.path: {path}: {name} lists {len(value)} layers, must be at most {MOST_LAYERS}")
    return facts


def _check_plain(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that the folder is a model in the usual files, and nothing that transformers would add to it."""
    path = folder / "config.json"
    if facts.get("transformers_weights"):
        raise UserError(
            f"model.path: {path}: transformers_weights is {facts['transformers_weights']!r}, a file of weights "
            "other than the usual; rename that to model.safetensors and remove the key"
        )
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model.path: {folder / ADAPTER}: transformers would add this adapter to the model beside it; move it "
            "elsewhere, or merge it into the weights"
        )
    if facts.get("quantization_config"):
        raise UserError(f"model.path: {path}: has a quantization_config; use the weights before quantisation")
