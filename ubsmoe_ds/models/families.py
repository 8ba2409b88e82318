"""The supported families of mixture-of-experts models: their names for the same things, and the rule of the K weights.

All are decoders whose blocks are softmax router -> top K -> SwiGLU experts. transformers gives them one form in memory
(`mlp.gate.weight`, `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), so only files and configs differ. A new family
is one entry of `FAMILIES`, and one model in tests/support/families.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json

MOST_CONFIG = 2**20  # bytes; a config.json has a few thousand
MOST_LAYERS = 1024  # known models have at most 126
MOST_EXPERTS = 2**16  # of a layer, and of all layers together; known models have some 23,000
MOST_LABELS = 2**16  # of a classifier's; transformers makes a name for each
SILU = ("silu", "swish")  # transformers' names of the experts' activation
ADAPTER = "adapter_config.json"
COUNTS = ("num_experts", "num_local_experts")  # the same number: transformers reads either, and may write the other


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are stored, and what they compute.

    block: name of a layer's MoE block in the weights' tensor names, `model.layers.0.<block>.`
    gate, up, down: names of an expert's projections there, `experts.0.<gate>.weight`
    num_experts, width: keys of the config for the number of experts of a layer and an expert's F
    shared: names of the block's modules that every token passes
    normed_queries: whether queries and keys pass a norm
    always_normalizes: whether a token's K weights sum to one whatever the config says
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    num_experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    shared: tuple[str, ...] = ()
    normed_queries: bool = False
    always_normalizes: bool = False

    def normalizes(self, config: Mapping[str, Any]) -> bool:
        """Return whether a token's K weights are made to sum to one."""
        return self.always_normalizes or bool(config["norm_topk_prob"])

    def usual_name(self, name: str) -> str:
        """Return a stored tensor's name as the family's files usually have it.

        transformers reads other names too: its own in memory, and those of a model saved without its head.
        """
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        return name.replace(".mlp.", f".{self.block}.")


FAMILIES = {
    "olmoe": Family(width="intermediate_size", normed_queries=True),
    "mixtral": Family(
        *("block_sparse_moe", "w1", "w3", "w2"),
        num_experts="num_local_experts",
        width="intermediate_size",
        always_normalizes=True,
    ),
    "qwen2_moe": Family(shared=("shared_expert", "shared_expert_gate")),
    "qwen3_moe": Family(normed_queries=True),
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
        raise UserError(f"model.path: {path}: has model_type {kind!r}; supported: {', '.join(FAMILIES)}")
    counts = [facts[name] for name in COUNTS if name in facts]
    if len(counts) == 2 and counts[0] != counts[1]:
        raise UserError(f"model.path: {path}: {' and '.join(COUNTS)} are {counts[0]!r} and {counts[1]!r}; remove one")
    facts |= dict.fromkeys(COUNTS, counts[0] if counts else None)
    most = MOST_EXPERTS
    for name in (family.num_experts, "num_experts_per_tok"):
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
