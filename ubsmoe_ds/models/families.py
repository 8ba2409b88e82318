"""What differs between families of mixture-of-experts checkpoints: names, and the rule of the K weights.

All are decoders whose blocks are softmax router -> top K -> SwiGLU experts; transformers gives them one form in memory
(`mlp.gate.weight`, `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), so that only files and configs differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Of one `model_type`.

    block: a layer's MoE block in a checkpoint's tensor names, `model.layers.0.<block>.`
    gate, up, down: an expert's projections there, `experts.0.<gate>.weight`
    num_experts, width: the config's keys for the experts of a layer and an expert's F
    shared: modules of the block that every token passes
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    num_experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    shared: tuple[str, ...] = ()

    def normalizes(self, config: Mapping[str, Any]) -> bool:
        """Whether a token's K weights are made to sum to one; Mixtral always does, and has no key for it."""
        return bool(config.get("norm_topk_prob", True))


FAMILIES = {
    "olmoe": Family(width="intermediate_size"),
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2", num_experts="num_local_experts", width="intermediate_size"),
    "qwen2_moe": Family(shared=("shared_expert", "shared_expert_gate")),
    "qwen3_moe": Family(),
}
