"""Read and check a model folder's config.json, and take from it the numbers that costs depend on."""

import math
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.cost import Mixer, ModelShape, Projection
from ubsmoe_ds.models.families import FAMILIES, read_facts
from ubsmoe_ds.models.family import Family

ALIGNMENT = 8  # elements of bf16
RECURRENT = "linear_attention"  # transformers' name of layers with a recurrence
SPARSE_KEYS = {  # keys that say which layers have experts, and their least values
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
}


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the folder's config.

    Raises:
        UserError: if it is missing, of a family that is not supported, of a model in which no layer has experts, or of
            one that trains with noise in its router.
    """
    _, facts = read_facts(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks a hundred keys and raises anything
        raise unusable(folder, error) from error
    config.num_experts_per_tok = facts["num_experts_per_tok"]  # one number, which may stand there once a layer
    layers = config.num_hidden_layers
    for key, least in SPARSE_KEYS.items():
        value = getattr(config, key, least)
        if type(value) is not int or value < least:
            raise UserError(f"model.path: {folder / 'config.json'}: {key} is {value!r}, must be at least {least}")
    if isinstance(layers, int) and not any(is_sparse(config, n) for n in range(layers)):
        given = " and ".join(key for key in (*SPARSE_KEYS, "mlp_only_layers") if hasattr(config, key))
        raise UserError(
            f"model.path: {folder / 'config.json'}: none of its {layers} layers has experts; see its {given}"
        )
    family = FAMILIES[config.model_type]
    missing = [key for key in family.keys if not hasattr(config, key)]
    if missing:
        raise UserError(
            f"model.path: {folder / 'config.json'}: transformers knows no {missing[0]} of {config.model_type!r}, which "
            "models/families.py names; this program cannot train such models"
        )
    noise = getattr(config, "router_jitter_noise", None)
    if noise:
        raise UserError(
            f"model.path: {folder / 'config.json'}: router_jitter_noise is {noise!r}, but training adds no noise here; "
            "set it to 0"
        )
    return config


def is_sparse(config: PreTrainedConfig, layer: int) -> bool:
    """Return whether a layer has experts; in some families the first, or some between, have none."""
    first, every, interval, start = (getattr(config, key, least) for key, least in SPARSE_KEYS.items())
    last = getattr(config, "moe_layer_end_index", layer)
    if layer in (getattr(config, "mlp_only_layers", None) or ()) or not max(first, start) <= layer <= last:
        return False
    return (layer + 1) % every == 0 and (layer + 1) % interval == 0


def check_length(config: PreTrainedConfig, length: int, key: str) -> None:
    """Check that the model has positions for so many tokens; `key` names the setting.

    Raises:
        UserError: if it has fewer.
    """
    if length > config.max_position_embeddings:
        raise UserError(
            f"{key}: {length} exceeds the model's max_position_embeddings, {config.max_position_embeddings}"
        )


def check_window(config: PreTrainedConfig, length: int) -> None:
    """Check that attention reaches back over so many tokens, as the mask of rows with continuations assumes.

    Raises:
        UserError: if the model has a shorter sliding window.
    """
    if sliding_window(config) < length:
        raise UserError(
            f"model.path: a question with an answer has {length} tokens, the sliding window "
            f"{sliding_window(config)}; lower max_length"
        )


def check_alignment(config: PreTrainedConfig, setting: str) -> None:
    """Check that torch's grouped products in bf16 take the experts on an accelerator: rows of 16 bytes.

    Args:
        config: the model's.
        setting: what asks for bf16.

    Raises:
        UserError: naming a size that is not divisible by 8.
    """
    for key in ("hidden_size", FAMILIES[config.model_type].width):
        if getattr(config, key) % ALIGNMENT:
            raise UserError(
                f"{setting}, but the model's {key}, {getattr(config, key)}, is not divisible by {ALIGNMENT}, as "
                "accelerators ask of experts in bf16; use fp32"
            )


def sliding_window(config: PreTrainedConfig) -> float:
    """Return how many tokens attention reaches back over, inf if all."""
    return getattr(config, "sliding_window", None) or math.inf  # 0 and None mean no window


def unusable(folder: Path, error: Exception) -> UserError:
    """Return the error to raise where transformers refused the folder's config, which `read_facts` could read."""
    reason = " ".join(str(error).split())[:300]
    written = read_facts(folder)[1].get("transformers_version")
    here = transformers.__version__
    by = f", and {written} wrote it" if written and written != here else ""
    return UserError(
        f"model.path: {str(folder / 'config.json')!r} cannot be used: transformers {here} refuses it{by} ({reason}); "
        "correct what it names"
    )


def model_shape(config: PreTrainedConfig, *, lora_rank: int = 0, lora_attention: bool = False) -> ModelShape:
    """Return the numbers that FLOPs and bytes depend on."""
    family = FAMILIES[config.model_type]
    sparse = [is_sparse(config, layer) for layer in range(config.num_hidden_layers)]
    dense, kinds = sparse.count(False), getattr(config, "layer_types", None) or ()
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        expert_width=getattr(config, family.width),
        num_experts=getattr(config, family.num_experts),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab=config.vocab_size,
        dense_layers=dense,
        leading_dense=sparse.index(True),
        dense_width=config.intermediate_size if dense else 0,
        shared_width=math.prod(getattr(config, key) for key in family.shared_width) if family.shared_width else 0,
        tied_embeddings=config.tie_word_embeddings,
        normed_queries=family.normed_queries,
        fused_attention=family.fused_attention,
        lora_rank=lora_rank,
        lora_attention=lora_attention,
        shared_gated=len(family.shared) == 2,
        attention=_attention(config, family),
        recurrence=_recurrence(config) if RECURRENT in kinds else None,
        recurrent=tuple(layer for layer, kind in enumerate(kinds) if kind == RECURRENT),
    )


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head's queries and keys."""
    if hasattr(config, "qk_nope_head_dim"):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(config: PreTrainedConfig, family: Family) -> Mixer | None:
    """Return the matrices of attention where they are not q, k, v and o: of latent and of gated attention."""
    d, heads, head = config.hidden_size, config.num_attention_heads, _head_dim(config)
    if hasattr(config, "kv_lora_rank"):
        low, values = config.kv_lora_rank, heads * config.v_head_dim
        q = config.q_lora_rank
        queries = [Projection(d, heads * head)] if q is None else [Projection(d, q), Projection(q, heads * head, False)]
        keys = Projection(d, low + config.qk_rope_head_dim)
        expanded = Projection(low, heads * config.qk_nope_head_dim + values, first=False)
        return Mixer((*queries, keys, expanded, Projection(values, d, first=False)), heads * head, values)
    if family.gated_attention:
        kv = Projection(d, config.num_key_value_heads * head)
        matrices = Projection(d, 2 * heads * head), kv, kv, Projection(heads * head, d, first=False)
        return Mixer(matrices, heads * head, heads * head)
    return None


def _recurrence(config: PreTrainedConfig) -> Mixer:
    """Return a gated delta rule: projections, a short convolution, and a state of [key, value] for each head."""
    d, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values, state = heads * config.linear_value_head_dim, config.linear_key_head_dim * config.linear_value_head_dim
    inside = Projection(d, 2 * keys + 2 * values + 2 * heads, adapted=False)
    convolution = 2 * config.linear_conv_kernel_dim * (2 * keys + values)
    per_token = (
        convolution + 3 * 2 * heads * state
    )  # what the state says of the key, its change, and the query's answer
    return Mixer((inside, Projection(values, d, first=False, adapted=False)), per_token=per_token)
