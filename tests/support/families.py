"""Small random models: every supported family, and variants within some."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.support import tiny

COMMON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, norm_topk_prob=False),
    "olmoe, tied": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, tie_word_embeddings=True),
    "olmoe, clipped and scaled": OlmoeConfig(
        **COMMON,
        intermediate_size=12,
        num_experts=8,
        clip_qkv=0.5,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    ),
    # norm_topk_prob is not a key of this family, and transformers ignores it there
    "mixtral": MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=8, norm_topk_prob=False),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=8, intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "qwen2_moe, every second": Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        norm_topk_prob=True,
        head_dim=8,
        mlp_only_layers=[1],
    ),
}


def saved_family(name: str, folder: Path, shard_size: str = "20KB") -> PreTrainedModel:
    """Save a random model of the family in several shards, and return it."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval()  # saving writes the dtype into it
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
        else:  # norms about 1, biases about 0
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    hf.save_pretrained(folder, max_shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return hf


def ids_and_mask(rows: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random token ids and a mask without padding."""
    torch.manual_seed(5)
    return torch.randint(2, tiny.VOCAB, (rows, length)), torch.ones(rows, length, dtype=torch.bool)
